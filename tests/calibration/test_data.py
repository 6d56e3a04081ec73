"""What counts as calibration data, which windows are cut from it, and what is refused."""

import datasets
import pytest
import torch

from hf_efficiency.calibration.data import (
    check_calibration,
    default_texts,
    needs_tokenizer,
    resolve_calibration,
    sample_from,
)

IDS = torch.arange(10, 70)  # (60,)


class Spelling:
    """A tokenizer whose ids are the letters' code points."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [ord(letter) for letter in text]}


def sorted_rows(tokens):
    return sorted(tokens.tolist())


def windows(start, stop, length):
    return [list(range(i, i + length)) for i in range(start, stop - length + 1, length)]


def test_stream_of_ids_is_cut_into_windows():
    """60 ids give 7 windows of 8; the last 4 ids are left over."""
    tokens = resolve_calibration(IDS, num_samples=99, seq_len=8)
    assert sorted_rows(tokens) == windows(10, 66, 8)
    assert tokens.dtype == torch.int64
    assert sorted_rows(resolve_calibration(IDS.tolist(), num_samples=99, seq_len=8)) == windows(10, 66, 8)


def test_rows_of_a_matrix_stay_apart():
    matrix = IDS.view(6, 10).to(torch.int32)
    tokens = resolve_calibration(matrix, num_samples=99, seq_len=8)
    assert sorted_rows(tokens) == [list(range(i, i + 8)) for i in range(10, 70, 10)]


def test_lists_of_ids_are_joined():
    rows = [[10, 11, 12], [13], [14, 15, 16, 17]]
    assert sorted_rows(resolve_calibration(rows, seq_len=4)) == [[10, 11, 12, 13], [14, 15, 16, 17]]
    tensors = [torch.tensor([[10, 11, 12]]), torch.tensor([13])]
    assert resolve_calibration(tensors, seq_len=4).tolist() == [[10, 11, 12, 13]]


def test_texts_are_joined():
    tokens = resolve_calibration(["abc", "", "defgh"], Spelling(), seq_len=4)
    assert sorted_rows(tokens) == [[97, 98, 99, 100], [101, 102, 103, 104]]
    assert torch.equal(resolve_calibration(("abc", "defgh"), Spelling(), seq_len=4), tokens)


@pytest.mark.parametrize("column", ["text", "content", "document"])
def test_dataset(column):
    data = datasets.Dataset.from_dict({"id": [1, 2], column: ["abcd", "efgh"]})
    assert sorted_rows(resolve_calibration(data, Spelling(), seq_len=4)) == [[97, 98, 99, 100], [101, 102, 103, 104]]


def test_real_tokenizer_says_nothing(texts, tiny_tokenizer, capfd):
    tokens = resolve_calibration(texts, tiny_tokenizer, num_samples=5, seq_len=64)
    assert tokens.shape == (5, 64)
    assert capfd.readouterr() == ("", "")


def test_default_text():
    assert sum(map(len, default_texts())) > 400_000
    tokens = resolve_calibration("default", Spelling(), num_samples=3, seq_len=100)
    assert tokens.shape == (3, 100)


def test_seed_chooses_the_samples():
    def draw(seed):
        return resolve_calibration(IDS, num_samples=4, seq_len=5, seed=seed)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert len({tuple(row) for row in draw(1).tolist()}) == 4  # without replacement


def test_self_samples_from_the_model(tiny_llama):
    tokens = resolve_calibration("self", num_samples=18, seq_len=12, seed=3, model=tiny_llama)
    assert tokens.shape == (18, 12)
    assert tokens.min() >= 0
    assert tokens.max() < 384
    assert torch.equal(tokens, sample_from(tiny_llama, 18, 12, 3))
    assert not torch.equal(tokens, sample_from(tiny_llama, 18, 12, 4))
    # After the random first token three are the most likely ones, whatever the seed; the cache changes nothing.
    with torch.no_grad():
        greedy = tiny_llama(tokens[:, :4]).logits.argmax(-1)
    assert torch.equal(greedy[:, :3], tokens[:, 1:4])
    with torch.no_grad():
        likely = tiny_llama(tokens).logits.argmax(-1)
    assert not torch.equal(likely[:, 3:-1], tokens[:, 4:])


@pytest.mark.parametrize(
    ("calibration", "wanted"),
    [
        ("default", True),
        ("self", False),
        (["text"], True),
        ([[1, 2]], False),
        ([1, 2], False),
        (IDS, False),
        ([IDS], False),
        (datasets.Dataset.from_dict({"text": ["a"]}), True),
    ],
)
def test_needs_tokenizer(calibration, wanted):
    assert needs_tokenizer(calibration) is wanted


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ("wikitext", ValueError, r"calibration='wikitext' is unknown: use 'default', 'self', or a list of texts"),
        (None, ValueError, "calibration=None: this method needs data"),
        ([], ValueError, "calibration is empty: give at least one text"),
        (torch.zeros(0, 8, dtype=torch.long), ValueError, "calibration is empty"),
        (torch.zeros(8, 0, dtype=torch.long), ValueError, "calibration is empty"),
        (datasets.Dataset.from_dict({"text": []}), ValueError, "calibration is empty"),
        (["", ""], ValueError, "calibration holds only empty texts"),
        (7, TypeError, r"calibration is a int; give a list of texts, a datasets\.Dataset"),
        ({"text": ["a"]}, TypeError, r"calibration is a dict; give a list of texts"),
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}),
            TypeError,
            r"calibration is a DatasetDict; .*one split",
        ),
        (
            datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(),
            TypeError,
            r"calibration is a IterableDataset; .*not streamed",
        ),
        (
            datasets.Dataset.from_dict({"prose": ["a"]}),
            ValueError,
            r"has the columns \['prose'\]; one of text, content, document must hold text\. Rename",
        ),
        (["a", 3], TypeError, "calibration holds a int where a text was expected"),
        (torch.rand(4, 8), TypeError, r"tensor of torch\.float32; token ids must be integers"),
        (torch.ones(2, 2, 8, dtype=torch.long), ValueError, r"shape \(2, 2, 8\); give token ids \(n, t\) or \(t,\)"),
        (["abc"], ValueError, "has 3 tokens, fewer than one sequence of seq_len=8. Give more text, or lower seq_len"),
        (IDS[:7], ValueError, "has 7 tokens, fewer than one sequence of seq_len=8"),
        (IDS[:14].view(2, 7), ValueError, "has 7 tokens, fewer than one sequence of seq_len=8"),
    ],
)
def test_bad_data(calibration, error, message):
    with pytest.raises(error, match=message):
        resolve_calibration(calibration, Spelling(), seq_len=8)


@pytest.mark.parametrize("name", ["num_samples", "seq_len", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "4"])
def test_bad_numbers(name, value):
    numbers = {"num_samples": 1, "seq_len": 1, "batch_size": 1, name: value}
    with pytest.raises(ValueError, match=f"{name}={value!r} must be a whole number of at least 1"):
        check_calibration("default", **numbers)


def test_missing_tokenizer_or_model():
    with pytest.raises(ValueError, match=r"text, but no tokenizer was found beside the model\. Pass `tokenizer=`"):
        resolve_calibration(["a"], None, seq_len=1)
    with pytest.raises(ValueError, match="'self' samples text from the model, but no model was given"):
        resolve_calibration("self", seq_len=4)


@pytest.mark.parametrize("wrong", [384, -1])
def test_ids_of_another_vocabulary(tiny_llama, wrong):
    with pytest.raises(ValueError, match=r"token ids from .* the model knows 0 to 383: .*another model"):
        resolve_calibration(torch.tensor([3, wrong, 5, 6]), seq_len=4, model=tiny_llama)
