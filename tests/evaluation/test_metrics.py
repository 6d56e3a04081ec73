import math

import pytest
import torch

from hf_efficiency.evaluation import kl_and_agreement, perplexity
from hf_efficiency.evaluation import metrics as metrics_module
from tests import tiny
from tests.evaluation.stubs import DigitTokenizer, TableModel


def log(rows):
    return torch.tensor(rows).log()


# p(next | 0), p(next | 1), p(next | 2)
P = [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.125, 0.125, 0.75]]
UNIFORM = [[1 / 3] * 3] * 3


def test_perplexity_by_hand():
    """Windows 001 and 120: p = 1/2, 1/4 and 1/4, 1/8; the last digit fills no window."""
    # -log p sums to log(2 * 4 * 4 * 8) = 8 log 2 over four tokens
    assert perplexity(TableModel(log(P)), DigitTokenizer(), "001 120 2", window=3) == pytest.approx(4)


def test_max_windows_reads_the_first_ones():
    """Window 001 alone: p = 1/2, 1/4."""
    value = perplexity(TableModel(log(P)), DigitTokenizer(), "001120", window=3, max_windows=1)
    assert value == pytest.approx(math.sqrt(8))


def test_list_of_texts_is_one_text():
    tokenizer = DigitTokenizer()
    assert perplexity(TableModel(log(P)), tokenizer, ["00", "1", "120"], window=3) == pytest.approx(4)
    assert tokenizer.calls == 1


@pytest.mark.parametrize("shift", [0, 3.5, -40.0])
def test_perplexity_ignores_a_constant_added_to_the_logits(shift):
    assert perplexity(TableModel(log(P) + shift), DigitTokenizer(), "001120", window=3) == pytest.approx(4, rel=1e-5)


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary(tiny_tokenizer, texts):
    model = tiny.build_llama(vocab_size=len(tiny_tokenizer))
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, tiny_tokenizer, texts, window=32, max_windows=4) == pytest.approx(len(tiny_tokenizer))


def test_kl_and_agreement_by_hand():
    """KL(P || uniform) of row 0 is 1/2 log 3/2 + 1/2 log 3/4, of row 1 the same; the uniform model always picks 0."""
    drift = kl_and_agreement(TableModel(log(UNIFORM)), TableModel(log(P)), DigitTokenizer(), "001 011", window=3)
    assert drift.mean_kl == pytest.approx(0.5 * math.log(1.5) + 0.5 * math.log(0.75), rel=1e-5)
    # the rows read are 0, 0, 0, 1: the reference picks 0, 0, 0, 1
    assert drift.top1_agreement == 0.75
    assert drift.perplexity == pytest.approx(3)
    # targets 0, 1, 1, 1 with p = 1/2, 1/4, 1/4, 1/2: 6 log 2 over four tokens
    assert drift.reference_perplexity == pytest.approx(2**1.5)
    assert drift.tokens == 4


def test_kl_is_taken_from_the_reference():
    """The other direction gives another number: KL(uniform || P) of row 0 is log(2/3)/3 + 2 log(4/3)/3."""
    drift = kl_and_agreement(TableModel(log(P)), TableModel(log(UNIFORM)), DigitTokenizer(), "000", window=3)
    assert drift.mean_kl == pytest.approx((math.log(2 / 3) + 2 * math.log(4 / 3)) / 3, rel=1e-5)


def test_chunks_do_not_change_the_numbers(tiny_tokenizer, texts, monkeypatch):
    model, reference = (tiny.build_llama(seed, vocab_size=len(tiny_tokenizer)) for seed in (0, 1))
    whole = kl_and_agreement(model, reference, tiny_tokenizer, texts, window=40, max_windows=2)
    monkeypatch.setattr(metrics_module, "_CHUNK_LOGITS", 7 * len(tiny_tokenizer))
    chunked = kl_and_agreement(model, reference, tiny_tokenizer, texts, window=40, max_windows=2)
    assert chunked.mean_kl == pytest.approx(whole.mean_kl, rel=1e-5)
    assert chunked.top1_agreement == whole.top1_agreement
    assert chunked.perplexity == pytest.approx(
        perplexity(model, tiny_tokenizer, texts, window=40, max_windows=2), rel=1e-5
    )


def test_bfloat16_model_against_itself_has_no_drift(tiny_llama, tiny_tokenizer, texts):
    model = tiny_llama.to(torch.bfloat16)
    drift = kl_and_agreement(model, model, tiny_tokenizer, texts, window=32, max_windows=2)
    assert (drift.mean_kl, drift.top1_agreement) == (0, 1)


def test_mode_and_gradients_come_back(tiny_llama, tiny_tokenizer, texts):
    tiny_llama.train()
    perplexity(tiny_llama, tiny_tokenizer, texts, window=32, max_windows=1)
    assert tiny_llama.training
    assert torch.is_grad_enabled()


def test_mode_comes_back_after_an_error():
    model = TableModel(torch.full((3, 3), math.nan)).train()
    with pytest.raises(ValueError, match="not finite"):
        perplexity(model, DigitTokenizer(), "001", window=3)
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_named(bad):
    table = log(P)
    table[1, 2] = bad
    with pytest.raises(ValueError, match=r"TableModel on window 1 are not finite.*check the weights"):
        perplexity(TableModel(table), DigitTokenizer(), "000 111", window=3)


def test_destroyed_model_has_infinite_perplexity():
    """A mean negative log-likelihood of 10,000 is no error, but exp of it is beyond a float."""
    model = TableModel(torch.tensor([[1e4, 0.0], [1e4, 0.0]]))
    assert perplexity(model, DigitTokenizer(), "0111", window=4) == math.inf


def test_text_shorter_than_a_window():
    with pytest.raises(ValueError, match=r"2 tokens, fewer than one window of 3.*longer text or a smaller window"):
        perplexity(TableModel(log(P)), DigitTokenizer(), "01", window=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 1}, "window is 1.*at least 2"),
        ({"window": 17}, "window is 17 tokens, but the model reads at most 16"),
        ({"window": 3, "max_windows": 0}, "max_windows is 0.*at least 1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        perplexity(TableModel(log(P)), DigitTokenizer(), "0" * 40, **settings)


def test_text_must_be_text():
    with pytest.raises(TypeError, match="strings, but it holds a int"):
        perplexity(TableModel(log(P)), DigitTokenizer(), ["000", 1], window=3)


def test_vocabularies_must_match():
    with pytest.raises(ValueError, match="3 logits a token and the reference 4"):
        kl_and_agreement(TableModel(log(P)), TableModel(torch.zeros(4, 4)), DigitTokenizer(), "000", window=3)
