"""The priority of each word: the share of its sentence that stays, less its place among the words it competes with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hf_efficiency.generation.compression.budget import filled
from hf_efficiency.generation.compression.coarse import STOP_WORDS
from hf_efficiency.generation.compression.fit import quantiles
from hf_efficiency.generation.compression.segments import Span, has_digit, name_flags
from hf_efficiency.generation.compression.token_scores import phrases, to_spans

if TYPE_CHECKING:
    from hf_efficiency.integrations.transformers.compression.parts import Parts
    from hf_efficiency.integrations.transformers.compression.prompt import Settings
    from hf_efficiency.integrations.transformers.compression.scoring import SmallModel
    from hf_efficiency.integrations.transformers.compression.units import Units

_GRANULARITY = 2.0  # LLMLingua's k: sentences that hold k times the budget go on to the word stage
_PROTECTED = 0.5  # share of the budget that digits and names of a prompt without a question may take


def word_priorities(
    units: Units,
    parts: Parts,
    shares: Sequence[float],
    ratios: list[float],
    read: list[int],
    settings: Settings,
    small: SmallModel | None,
    classifier: Any,
    ranked: bool,
) -> list[float]:
    """The priority of each word; at about 0 the budget is full, and from `Units.MUST` on a word always stays.

    Args:
        units: Sentences and words of the prompt.
        parts: Of the prompt.
        shares: Of the parts, from the budget controller.
        ratios: Of the sentences; without a question those with little information fall below 0 here.
        read: Sentences that the method reads and scores.
        settings: What was asked for.
        small: The causal model that scores.
        classifier: Or the token classifier and its tokenizer.
        ranked: The sentences were ranked by a question.
    """
    words = [units.text[start:end] for start, end in units.words]
    mean_share = _mean_share(units, shares, read)
    scores = _scores(units, parts, read, mean_share, settings, small, classifier)
    if not ranked and settings.coarse and settings.method != "coarse":
        _drop_plain_sentences(units, parts, shares, ratios, scores)
    places = quantiles(scores, [_group(units, parts, w) for w in range(len(words))])
    if settings.method == "coarse":
        places = _position(units)
    priorities = [ratios[s] - q for s, q in zip(units.word_sentence, places, strict=True)]
    digits, names = _protected(units, words, settings)
    if ranked:
        for word in {*digits, *names}:
            priorities[word] += places[word]  # before all others of its sentence
    else:
        _lift(units, parts, shares, priorities, scores, digits, names)
    for w, sentence in enumerate(units.word_sentence):
        part = parts.parts[units.sentence_part[sentence]]
        if part.role == "question" and part.ratio is None:
            priorities[w] = units.MUST + 1
    for word in _forced(units, settings.force):
        priorities[word] = units.MUST
    return priorities


def _mean_share(units: Units, shares: Sequence[float], read: list[int]) -> float:
    tokens = sum(units.sentence_tokens[s] for s in read)
    kept = sum(shares[units.sentence_part[s]] * units.sentence_tokens[s] for s in read)
    return kept / tokens if tokens else 1.0


def _scores(
    units: Units,
    parts: Parts,
    read: list[int],
    share: float,
    settings: Settings,
    small: SmallModel | None,
    classifier: Any,
) -> list[float]:
    """What the method says of each word of the sentences that are read; 0 elsewhere."""
    scores = [0.0] * len(units.words)
    chosen = set(read)
    indices = [w for w, s in enumerate(units.word_sentence) if s in chosen]
    if not indices or settings.method == "coarse":
        return scores
    text, spans = "", []
    for w in indices:
        start, end = units.words[w]
        spans.append((len(text), len(text) + end - start))
        text += units.text[start:end]
    offsets, values = _values(text, share, parts.question, settings.method, small, classifier)
    if settings.method == "selective-context":
        groups = phrases([text[a:b] for a, b in spans], STOP_WORDS)
        sums = to_spans(values, offsets, spans, "sum")
        totals: dict[int, float] = {}
        for group, value in zip(groups, sums, strict=True):
            totals[group] = totals.get(group, 0.0) + value
        found = [totals[group] for group in groups]
    else:
        found = to_spans(values, offsets, spans)
    for w, value in zip(indices, found, strict=True):
        scores[w] = value
    return scores


def _values(
    text: str, share: float, question: str | None, method: str, small: SmallModel | None, classifier: Any
) -> tuple[list[Span], torch.Tensor]:
    """Spans and values of the small model's tokens."""
    if small is None:
        from hf_efficiency.integrations.transformers.compression.classifier import keep_probabilities

        model, tokenizer = classifier
        return keep_probabilities(model, tokenizer, text)
    if method == "longllmlingua" and question is not None:
        return small.contrast(text, question)
    if method == "attention":
        return small.attention(text, question)
    if method == "selective-context":
        return small.surprisal(text)
    return small.iterative(text, share)


def _drop_plain_sentences(
    units: Units, parts: Parts, shares: Sequence[float], ratios: list[float], scores: list[float]
) -> None:
    """Keeps the sentences of highest mean score for the word stage (LLMLingua's coarse stage by perplexity)."""
    context = [s for s in range(len(units.sentences)) if parts.parts[units.sentence_part[s]].role == "context"]
    totals = {s: [0.0, 0] for s in context}
    for w, s in enumerate(units.word_sentence):
        if s in totals:
            totals[s][0] += scores[w]
            totals[s][1] += 1
    mean = {s: total / count for s, (total, count) in totals.items()}
    order = sorted(context, key=lambda s: (-mean[s], s))
    counts = units.sentence_tokens
    budget = sum(shares[units.sentence_part[s]] * counts[s] for s in context)
    kept = set(filled(order, counts, _GRANULARITY * budget))
    share = min(1.0, budget / max(1, sum(counts[s] for s in kept)))
    for place, s in enumerate(order):
        ratios[s] = share if s in kept else -1 - place / len(order)


def _group(units: Units, parts: Parts, word: int) -> int:
    """Words compete within their role: all of the context, each instruction."""
    part = units.word_part(word)
    return -1 if parts.parts[part].role == "context" and parts.parts[part].ratio is None else part


def _position(units: Units) -> list[float]:
    """The place of each word in its sentence, shrunk so that a sentence goes in whole before the next one."""
    result, last, place = [], -1, 0
    for sentence in units.word_sentence:
        place = place + 1 if sentence == last else 0
        last = sentence
        result.append(1e-6 * place)
    return result


def _protected(units: Units, words: list[str], settings: Settings) -> tuple[list[int], list[int]]:
    """Words with digits, and the other words of names."""
    digits = [w for w, word in enumerate(words) if settings.keep_digits and has_digit(word)]
    names: list[int] = []
    if settings.keep_names:
        start = 0
        while start < len(words):
            end = start
            while end < len(words) and units.word_sentence[end] == units.word_sentence[start]:
                end += 1
            names += [start + i for i, flag in enumerate(name_flags(words[start:end])) if flag]
            start = end
    return digits, sorted(set(names) - set(digits))


def _lift(
    units: Units,
    parts: Parts,
    shares: Sequence[float],
    priorities: list[float],
    scores: list[float],
    digits: list[int],
    names: list[int],
) -> None:
    """Raises digits, then names, above other words until they fill their share of the budget."""
    budget = sum(shares[p] * units.part_tokens(p) for p in range(len(parts.parts)))
    size = [max(1, (end - start) // 3) for start, end in units.words]
    order = sorted(digits, key=lambda w: -scores[w]) + sorted(names, key=lambda w: -scores[w])
    chosen = filled(order, size, _PROTECTED * budget) if order else []
    for place, word in enumerate(chosen):
        priorities[word] = 3 - place / len(chosen)


def _forced(units: Units, force: Sequence[str]) -> list[int]:
    """Words that overlap an occurrence of a forced string."""
    found = []
    for string in force:
        at = units.text.find(string) if string else -1
        while at >= 0:
            end = at + len(string)
            found += [w for w, (a, b) in enumerate(units.words) if a < end and at < b]
            at = units.text.find(string, end)
    return found
