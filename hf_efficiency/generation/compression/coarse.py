"""Which sentences and documents a question is about: word overlap (BM25) and a small model's p(question | sentence).

Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond", equation 3.11, with the idf of
Lucene (never negative); LongLLMLingua, equation 3 for the model's part.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_TOKEN = re.compile(r"[A-Za-z0-9]+(?:['\u2019_\-][A-Za-z0-9]+)*|[^\W\d_]+|\d+")
_ENDINGS = ("ingly", "edly", "ing", "ies", "ied", "ed", "es", "ly", "s")
_STOP = """a an and are as at be been but by can could did do does for from had has have he her his how i if in into is
    it its me more my no not of on or our she should so than that the their them then there these they this to was we
    were what when where which who whom whose why will with would you your"""
STOP_WORDS = frozenset(_STOP.split())


def terms(text: str) -> list[str]:
    """Lower-case words without stop words, common English endings cut; scripts without spaces give letters in pairs."""
    found = []
    for word in _TOKEN.findall(text):
        word = word.lower().removesuffix("'s").removesuffix("\u2019s")
        if not word.isascii() and len(word) > 2 and ord(max(word)) > 0x2E80:
            found += [word[i : i + 2] for i in range(len(word) - 1)]
        elif word not in STOP_WORDS:
            found.append(_stem(word))
    return found


def _stem(word: str) -> str:
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word


def bm25(texts: Sequence[str], question: str, *, k1: float = 1.2, b: float = 0.75) -> list[float]:
    """The score of each text for the question, at least 0.

    Sum over the question's terms of ln(1 + (N - n + 0.5) / (n + 0.5)) tf (k1 + 1) / (tf + k1 (1 - b + b len / mean)).
    """
    bags = [Counter(terms(text)) for text in texts]
    lengths = [sum(bag.values()) for bag in bags]
    mean = max(1.0, sum(lengths) / max(1, len(texts)))
    scores = [0.0] * len(texts)
    for term in set(terms(question)):
        holding = sum(term in bag for bag in bags)
        idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
        for i, bag in enumerate(bags):
            if bag[term]:
                scores[i] += idf * bag[term] * (k1 + 1) / (bag[term] + k1 * (1 - b + b * lengths[i] / mean))
    return scores


def combined(lexical: Sequence[float], likelihood: Sequence[float | None], weight: float = 0.5) -> list[float]:
    """Both views on one scale: lexical / max plus `weight` times the place between the least and the most likely.

    Args:
        lexical: BM25 of each text.
        likelihood: Mean log-probability of the question after each text; None where the model was not asked (those
            count as the least likely).
        weight: Of the model's part.
    """
    top = max(lexical, default=0.0) or 1.0
    known = [value for value in likelihood if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    width = (high - low) or 1.0
    model = [0.0 if value is None else (value - low) / width for value in likelihood]
    return [a / top + weight * m for a, m in zip(lexical, model, strict=True)]


def with_neighbours(scores: Sequence[float], groups: Sequence[int], share: float = 0.2) -> list[float]:
    """Adds a share of the better neighbour in the same document: what "it" means stands in the sentence before."""
    result = []
    for i, score in enumerate(scores):
        beside = [scores[j] for j in (i - 1, i + 1) if 0 <= j < len(scores) and groups[j] == groups[i]]
        result.append(score + share * max(beside, default=0.0))
    return result
