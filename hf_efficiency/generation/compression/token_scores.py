"""From a small model's numbers for its own tokens to scores of words and phrases.

Shape legend: t tokens. Spans are characters, so that the small model and the model that reads the result may have
different tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_efficiency.generation.compression.segments import Span


def surprisal(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p of each target (t), in nats, from the logits (t, vocabulary) before it."""
    logits = logits.float()
    return logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]


def contrastive(alone: Tensor, after_question: Tensor) -> Tensor:
    """How much the question helps to foresee each token (LongLLMLingua, equation 4): the fall of its surprisal (t).

    A positive value is a token that the question speaks of.
    """
    return alone - after_question


def to_spans(values: Tensor, offsets: Sequence[Span], spans: Sequence[Span], reduce: str = "mean") -> list[float]:
    """The value of each span: the mean (or max, or sum) over the tokens that overlap it; 0 where none does.

    Args:
        values: Of the tokens (t).
        offsets: Spans of the tokens, ascending.
        spans: Ascending.
        reduce: "mean", "max" or "sum".
    """
    numbers = values.tolist()
    result, first = [], 0
    for start, end in spans:
        while first < len(offsets) and offsets[first][1] <= start:
            first += 1
        inside, i = [], first
        while i < len(offsets) and offsets[i][0] < end:
            inside.append(numbers[i])
            i += 1
        if not inside:
            result.append(0.0)
        elif reduce == "max":
            result.append(max(inside))
        else:
            result.append(sum(inside) / (len(inside) if reduce == "mean" else 1))
    return result


def keep_top(scores: Tensor, ratio: float) -> Tensor:
    """Mask (t) of the `ratio` highest scores, at least one, ties by place (LLMLingua's threshold of a segment)."""
    keep = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    count = min(len(scores), max(1, round(ratio * len(scores))))
    keep[scores.argsort(descending=True, stable=True)[:count]] = True
    return keep


def phrases(words: Sequence[str], stops: frozenset[str]) -> list[int]:
    """The phrase of each word, Selective Context's unit: it begins at a function word or after punctuation.

    Li et al. 2023 take noun phrases from a parser; a run of "function words, then content words" is what a noun or verb
    phrase mostly is in English, and needs none.
    """
    result, current, content = [], -1, True
    for word in words:
        bare = word.strip().strip("\"'()[]{}.,;:!?").lower()
        function = bare in stops
        if current < 0 or (function and content):
            current += 1
            content = False
        content = content or not function
        result.append(current)
        if word.rstrip()[-1:] in ",;:.!?":
            current += 1
            content = False
    return result
