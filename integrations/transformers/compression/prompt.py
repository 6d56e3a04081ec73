"""`compress_prompt`: the stages in order, from a prompt to a shorter one.

Parts share the budget (`budget.py`); with a question, sentences are ranked and the best stay whole (`coarse.py`); what
is left of the budget is filled with words that the method scores; the target's tokenizer counts (`fit.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_efficiency.evaluation.metrics import evaluating
from hf_efficiency.generation.compression.budget import filled, part_ratios, ranked_ratios
from hf_efficiency.generation.compression.coarse import bm25, combined, with_neighbours
from hf_efficiency.generation.compression.fit import fit
from hf_efficiency.generation.compression.result import Compressed, kept_map
from hf_efficiency.generation.compression.segments import Segment
from hf_efficiency.integrations.transformers.compression.parts import Parts, read_parts
from hf_efficiency.integrations.transformers.compression.scoring import SmallModel, encode
from hf_efficiency.integrations.transformers.compression.units import Units, cut_units
from hf_efficiency.integrations.transformers.compression.words import word_priorities

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHODS = ("auto", "coarse", "llmlingua", "longllmlingua", "llmlingua2", "attention", "selective-context")
_WHOLE = 0.8  # share of the context's budget for whole sentences, where the others are cut by the word
_ASKED = 0.4  # share of the context's tokens that the small model may read to judge sentences


@dataclass(frozen=True)
class Settings:
    """What `compress_prompt` was asked for.

    Attributes:
        method: One of METHODS but "auto".
        coarse: Rank sentences first.
        force: Strings whose words always stay.
        keep_digits: Words with digits go before others.
        keep_names: Names too.
    """

    method: str
    coarse: bool
    force: tuple[str, ...]
    keep_digits: bool
    keep_names: bool


def compress_prompt(
    prompt: str | Sequence[str | Segment] | Sequence[dict[str, Any]],
    *,
    ratio: float,
    method: str = "auto",
    question: str | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    target_tokenizer: PreTrainedTokenizerBase | None = None,
    coarse: bool = True,
    force: Sequence[str] = (),
    keep_digits: bool = True,
    keep_names: bool = True,
    reorder: bool | None = None,
) -> Compressed:
    """A shorter prompt that says what matters.

    Args:
        prompt: A text; a list of documents (strings or `Segment`s with roles); or chat messages, whose system messages
            are instructions and whose last user message is the question.
        ratio: Share of the tokens to keep, between 0 and 1, by `target_tokenizer`; it is met within 3 % or one token.
        method: "coarse" (whole sentences by the question), "llmlingua" (surprisal, each segment read after what is
            kept), "longllmlingua" (what the question makes likelier), "llmlingua2" (a token classifier trained with
            `hf-efficiency train-compressor`), "attention", "selective-context" (phrases by their information), or
            "auto": with a question "llmlingua", or "coarse" where there is no model; without one "selective-context".
        question: What will be asked. Where the prompt holds it, it stays whole; it is not added where it does not.
        model: The small model: a causal one, or the token classifier for "llmlingua2".
        tokenizer: Its tokenizer, a fast one.
        target_tokenizer: Of the model that will read the prompt; by default `tokenizer`.
        coarse: Rank sentences before words; off, words of all sentences compete, as in the papers' token-level stage.
        force: Strings that always stay, with the words they lie in.
        keep_digits: Words with digits go before others.
        keep_names: So do names.
        reorder: Put the most relevant documents first; by default for "longllmlingua" with several documents. Never
            for a chat.

    Raises:
        TypeError: The prompt is none of these, or a tokenizer is a slow one.
        ValueError: The prompt is empty, the ratio is out of range, the method is unknown or lacks what it needs, or
            what must stay (question, forced strings) is longer than the budget.
    """
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 < ratio <= 1:
        raise ValueError(f"ratio is {ratio!r}; it must be above 0 and at most 1 (the share of tokens to keep)")
    counter = target_tokenizer if target_tokenizer is not None else tokenizer
    if counter is None:
        raise ValueError("no tokenizer was given: pass tokenizer= (the small model's) or target_tokenizer=")
    if isinstance(force, str):
        raise TypeError(f"force is the string {force!r}; give a list of strings")
    parts = read_parts(prompt, question)
    method = _checked_method(method, parts.question, model, tokenizer)
    settings = Settings(method, coarse, tuple(force), keep_digits, keep_names)
    units = cut_units(parts, counter)
    budget = max(1, round(ratio * units.tokens))
    _check_question(parts, counter, budget)
    if reorder is None:
        reorder = method == "longllmlingua" and parts.messages is None
    if model is None or tokenizer is None or (method == "coarse" and not hasattr(model, "generate")):
        return _compressed(units, parts, budget, settings, None, None, counter, reorder)
    with evaluating(model):
        small = None if method == "llmlingua2" else SmallModel(model, tokenizer)
        return _compressed(units, parts, budget, settings, small, (model, tokenizer), counter, reorder)


def _checked_method(method: str, question: str | None, model: Any, tokenizer: Any) -> str:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    if method == "auto":
        if question is None:
            method = "selective-context"  # one reading of the prompt, where LLMLingua reads what is kept again
        else:
            method = "coarse" if model is None else "llmlingua"
    if method in ("coarse", "longllmlingua") and question is None:
        raise ValueError(f"method={method!r} ranks by a question: pass question=, or use method='llmlingua'")
    if method != "coarse" and (model is None or tokenizer is None):
        kind = "a token classifier (hf-efficiency train-compressor makes one)" if method == "llmlingua2" else (
            "a small causal language model"
        )  # fmt: skip
        missing = "model=" if model is None else "tokenizer="
        raise ValueError(f"method={method!r} needs {kind} and its tokenizer, and {missing} is missing")
    if method == "llmlingua2" and "TokenClassification" not in type(model).__name__:
        raise ValueError(
            f"method='llmlingua2' needs a token classifier, not a {type(model).__name__}: train one with "
            "hf-efficiency train-compressor and load it with AutoModelForTokenClassification"
        )
    return method


def _check_question(parts: Parts, counter: Any, budget: int) -> None:
    """A question that is no part of the prompt takes no room, but has none either where it is longer than all of it."""
    length = len(encode(counter, parts.question)[0]) if parts.question else 0
    if length > budget:
        raise ValueError(
            f"the question has {length} tokens, but the ratio leaves a budget of {budget} tokens: raise the ratio or "
            "shorten the question"
        )


def _compressed(
    units: Units,
    parts: Parts,
    budget: int,
    settings: Settings,
    small: SmallModel | None,
    classifier: Any,
    counter: Any,
    reorder: bool,
) -> Compressed:
    """The stages after the checks."""
    shares = part_ratios(
        [units.part_tokens(i) for i in range(len(parts.parts))],
        [part.role for part in parts.parts],
        budget,
        [part.ratio for part in parts.parts],
    )
    relevance = _relevance(units, parts, settings, small)
    ratios = _sentence_ratios(units, parts, shares, relevance, settings)
    if not relevance and settings.method != "coarse" and settings.coarse:
        read = [s for s in range(len(units.sentences)) if parts.parts[units.sentence_part[s]].role != "question"]
    else:
        read = [s for s, tau in enumerate(ratios) if 0 < tau < 1]
    priorities = word_priorities(units, parts, shares, ratios, read, settings, small, classifier, bool(relevance))
    order = _part_order(units, parts, relevance) if reorder and relevance else list(range(len(parts.parts)))

    def count(chosen: list[int]) -> int:
        return len(encode(counter, units.build(chosen, order)[0])[0])

    chosen = fit(priorities, budget, count)
    must = [i for i, priority in enumerate(priorities) if priority >= units.MUST]
    if len(set(must) - set(chosen)):
        raise ValueError(
            f"the question and the forced strings need {count(must)} tokens, but the ratio leaves a budget of "
            f"{budget}: raise the ratio or force less"
        )
    text, spans = units.build(chosen, order)
    return Compressed(
        text,
        parts.text,
        kept_map(units.offsets, spans),
        spans,
        count(chosen),
        units.tokens,
        settings.method,
        _messages(units, parts, chosen),
        {units.sentences[i]: score for i, score in relevance.items()},
    )


def _relevance(units: Units, parts: Parts, settings: Settings, small: SmallModel | None) -> dict[int, float]:
    """Relevance of each sentence of the context to the question; empty without one, or without this stage."""
    if parts.question is None or not settings.coarse:
        return {}
    context = [s for s in range(len(units.sentences)) if parts.parts[units.sentence_part[s]].role == "context"]
    texts = [units.sentence_text(s) for s in context]
    lexical = bm25(texts, parts.question)
    groups = [units.sentence_part[s] for s in context]
    documents = sorted(set(groups))
    if len(documents) > 1:
        whole = bm25([parts.text[parts.parts[d].start : parts.parts[d].end] for d in documents], parts.question)
        top = max(whole) or 1.0
        best = max(lexical, default=0.0) or 1.0
        bonus = {d: 0.3 * best * score / top for d, score in zip(documents, whole, strict=True)}
        lexical = [score + bonus[g] for score, g in zip(lexical, groups, strict=True)]
    likelihood: list[float | None] = [None] * len(context)
    if small is not None:
        order = sorted(range(len(context)), key=lambda i: (-lexical[i], i))
        asked = filled(order, [units.sentence_tokens[context[i]] for i in range(len(context))],
                       _ASKED * sum(units.sentence_tokens[s] for s in context))  # fmt: skip
        for i, value in zip(asked, small.likelihood([texts[i] for i in asked], parts.question), strict=True):
            likelihood[i] = value
    scores = with_neighbours(combined(lexical, likelihood), groups)
    return dict(zip(context, scores, strict=True))


def _sentence_ratios(
    units: Units, parts: Parts, shares: Sequence[float], relevance: dict[int, float], settings: Settings
) -> list[float]:
    """The share of each sentence's words that stays; above 1 whole, in that order; below 0 only where room is left."""
    ratios = [shares[part] for part in units.sentence_part]
    if not relevance:
        return ratios
    order = sorted(relevance, key=lambda s: (-relevance[s], s))
    counts = units.sentence_tokens
    budget = sum(shares[units.sentence_part[s]] * counts[s] for s in order)
    places = {s: place / len(order) for place, s in enumerate(order)}
    if settings.method == "coarse":
        return [3 - places[s] if s in places else ratio for s, ratio in enumerate(ratios)]
    if settings.method == "longllmlingua":
        kept = filled(order, counts, 1.5 * budget)
        mean = min(1.0, budget / max(1, sum(counts[s] for s in kept)))
        chosen = dict(zip(kept, ranked_ratios(range(len(kept)), mean, 0.5), strict=True))
    else:
        whole = set(filled(order, counts, _WHOLE * budget))
        left = budget - sum(counts[s] for s in whole)
        partly = filled([s for s in order if s not in whole], counts, 2 * left) if left > 0 else []
        share = min(0.99, left / max(1, sum(counts[s] for s in partly)))
        chosen = {s: 3 - places[s] for s in whole} | dict.fromkeys(partly, max(share, 0.01))
    return [chosen.get(s, -1 - places[s]) if s in places else ratio for s, ratio in enumerate(ratios)]


def _part_order(units: Units, parts: Parts, relevance: dict[int, float]) -> list[int]:
    """Parts in their order, but the context's documents by their best sentence."""
    best: dict[int, float] = {}
    for sentence, score in relevance.items():
        part = units.sentence_part[sentence]
        best[part] = max(score, best.get(part, score))
    ranked = iter(sorted(best, key=lambda part: (-best[part], part)))
    return [next(ranked) if part in best else part for part in range(len(parts.parts))]


def _messages(units: Units, parts: Parts, chosen: list[int]) -> list[dict[str, Any]] | None:
    if parts.messages is None:
        return None
    result = []
    for index, message in enumerate(parts.messages):
        own = [p for p, part in enumerate(parts.parts) if part.message == index]
        inside = [u for u in chosen if units.word_part(u) in own]
        text = units.build(inside, own)[0]
        if text:
            result.append({**message, "content": text})
    return result
