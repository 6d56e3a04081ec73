"""Prompts get as short as was asked, keep what must stay, and an answer finds its way back."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForTokenClassification

from hf_efficiency import compress_prompt
from hf_efficiency.generation.compression import Compressed, Segment
from hf_efficiency.generation.compression.alignment import aligned
from hf_efficiency.generation.compression.budget import part_ratios, ranked_ratios
from hf_efficiency.generation.compression.coarse import bm25
from hf_efficiency.generation.compression.fit import fit
from hf_efficiency.generation.compression.token_scores import surprisal, to_spans
from hf_efficiency.integrations.transformers.compression.scoring import SmallModel, encode

FACT = "The night guard keeps the spare key in locker 4821."
QUESTION = "In which locker is the spare key?"


@pytest.fixture(scope="module")
def prompt(texts):
    return " ".join([texts[0][:400], FACT, texts[1][:400]])


@pytest.mark.parametrize("method", ["llmlingua", "longllmlingua", "attention", "selective-context", "coarse"])
@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_ratio_and_fact_with_the_question(method, ratio, prompt, tiny_llama, tiny_tokenizer):
    found = compress_prompt(
        prompt, ratio=ratio, method=method, question=QUESTION, model=tiny_llama, tokenizer=tiny_tokenizer
    )
    assert found.ratio == pytest.approx(ratio, rel=0.03)
    assert found.tokens == len(tiny_tokenizer(found.text, add_special_tokens=False)["input_ids"])
    assert "4821" in found.text
    assert len(found.kept) == found.original_tokens
    for at, source, length in found.spans:
        assert found.text[at : at + length] == prompt[source : source + length]


@pytest.mark.parametrize("method", ["llmlingua", "attention", "selective-context"])
def test_digits_and_forced_strings_stay_without_a_question(method, prompt, tiny_llama, tiny_tokenizer):
    found = compress_prompt(
        prompt, ratio=0.3, method=method, force=["night"], model=tiny_llama, tokenizer=tiny_tokenizer
    )
    assert "4821" in found.text
    assert "night" in found.text
    assert found.ratio == pytest.approx(0.3, rel=0.03)


def test_token_classifier_decides(prompt, tiny_tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=2,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForTokenClassification(config).eval()
    found = compress_prompt(prompt, ratio=0.4, method="llmlingua2", model=model, tokenizer=tiny_tokenizer)
    assert found.ratio == pytest.approx(0.4, rel=0.03)


def test_chat_keeps_roles_and_the_last_question(prompt, tiny_llama, tiny_tokenizer):
    chat = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": "I have read it."},
        {"role": "user", "content": QUESTION},
    ]
    found = compress_prompt(chat, ratio=0.5, model=tiny_llama, tokenizer=tiny_tokenizer)
    assert found.messages[-1] == chat[-1]
    assert found.messages[0]["role"] == "system"
    assert any("4821" in message["content"] for message in found.messages)
    assert found.ratio == pytest.approx(0.5, rel=0.03)


def test_documents_are_put_in_order_of_relevance(texts, tiny_tokenizer):
    documents = [texts[0][:300], FACT, Segment(QUESTION, "question")]
    found = compress_prompt(documents, ratio=0.6, method="coarse", tokenizer=tiny_tokenizer, reorder=True)
    assert found.text.startswith(FACT)
    assert found.text.endswith(QUESTION)


def test_surprisal_reads_like_one_forward(tiny_llama, tiny_tokenizer):
    text = FACT * 30  # more than one chunk
    with torch.no_grad():
        _, values = SmallModel(tiny_llama, tiny_tokenizer).surprisal(text[:700])
        ids, _ = encode(tiny_tokenizer, text[:700])
        logits = tiny_llama(torch.tensor([[1, *ids]])).logits[0, :-1]
    torch.testing.assert_close(values, surprisal(logits, torch.tensor(ids)), atol=1e-4, rtol=1e-4)


def test_iterative_scores_with_all_kept_are_plain_surprisal(tiny_llama, tiny_tokenizer):
    small = SmallModel(tiny_llama, tiny_tokenizer)
    with torch.no_grad():
        _, plain = small.surprisal(FACT)
        _, all_kept = small.iterative(FACT, 1.0, segment=7)
        _, some_kept = small.iterative(FACT, 0.5, segment=7)
    torch.testing.assert_close(all_kept, plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(some_kept[:7], plain[:7], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(some_kept[7:], plain[7:], atol=1e-2)


def test_likelihood_of_the_question_in_a_padded_batch(tiny_llama, tiny_tokenizer):
    small = SmallModel(tiny_llama, tiny_tokenizer)
    with torch.no_grad():
        both = small.likelihood([FACT, "No."], QUESTION)
        alone = small.likelihood([FACT], QUESTION) + small.likelihood(["No."], QUESTION)
    assert both == pytest.approx(alone, abs=1e-4)


def test_budget_controller():
    """Question 10 whole, instruction .9 of 20, so 22 of the budget of 50 are left for 100."""
    assert part_ratios([20, 100, 10], ["instruction", "context", "question"], 50) == pytest.approx([0.9, 0.22, 1.0])
    assert ranked_ratios([0, 1], 0.5, 0.2) == pytest.approx([0.7, 0.5])


def test_bm25_by_hand():
    """One of two texts holds the term once, both are of mean length: ln(1 + 1.5 / 1.5) 2.2 / 2.2."""
    assert bm25(["red", "blue"], "red?") == pytest.approx([0.6931, 0.0], abs=1e-4)


def test_fit_fills_what_a_long_unit_leaves():
    sizes = [3, 5, 1, 1]
    assert fit([4, 3, 2, 1], 5, lambda chosen: sum(sizes[i] for i in chosen)) == [0, 2, 3]


def test_surprisal_and_spans_by_hand():
    """p = 1/2 at each of two tokens: ln 2."""
    values = surprisal(torch.zeros(2, 2), torch.tensor([0, 1]))
    assert values.tolist() == pytest.approx([0.6931, 0.6931], abs=1e-4)
    assert to_spans(torch.tensor([1.0, 3.0, 5.0]), [(0, 2), (2, 4), (4, 6)], [(0, 4), (4, 6)]) == [2.0, 5.0]


def test_aligned_takes_the_nearest_occurrence():
    assert aligned(["the", "cat", "and", "the", "dog"], ["cat", "the", "dog"]) == [False, True, False, True, True]


def test_answers_get_the_words_of_the_original_back():
    original = "Nobody came. The spare key lies in the blue locker."
    text = "spare key blue locker."
    spans = [(0, 17, 9), (10, 39, 12)]
    found = Compressed(text, original, [], spans, 4, 11, "coarse")
    assert found.recover("It says: spare key blue locker.") == "It says: spare key lies in the blue locker."
    assert found.recover("No idea.") == "No idea."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0}, "ratio is 0; it must be above 0 and at most 1"),
        ({"ratio": 1.2}, "ratio is 1.2; it must be above 0"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"method": "magic"}, "method is 'magic'; it must be one of auto, coarse"),
        ({"method": "llmlingua"}, "needs a small causal language model and its tokenizer, and model= is missing"),
        ({"method": "llmlingua2"}, "needs a token classifier"),
        ({"method": "coarse"}, "ranks by a question: pass question="),
        ({"question": "why " * 40}, "the question has .* tokens, but the ratio leaves a budget of"),
        ({"question": "Why?", "force": ["word"]}, "forced strings need .* tokens, but the ratio leaves a budget"),
        ({"tokenizer": None}, "no tokenizer was given"),
    ],
)
def test_bad_input(arguments, message, tiny_tokenizer):
    given = {"prompt": "word " * 50, "ratio": 0.5, "tokenizer": tiny_tokenizer, **arguments}
    with pytest.raises(ValueError, match=message):
        compress_prompt(given.pop("prompt"), **given)
