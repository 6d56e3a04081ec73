"""Which words of an original a compression kept: labels for a token classifier (LLMLingua-2, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

Words = Sequence[str]


def aligned(original: Words, compressed: Words, window: int = 150) -> list[bool]:
    """For each word of the original, whether the compression holds it (LLMLingua-2, algorithm 1).

    Each compressed word is looked for around the place of the one before, at growing distance to the right, then to
    the left, at most `window` words away; words that are equal but for case and punctuation match, and each is used
    once.
    """
    labels = [False] * len(original)
    plain = [_plain(word) for word in original]
    place = -1
    for word in map(_plain, compressed):
        right = range(place + 1, min(len(original), place + 1 + window))
        left = range(place, max(-1, place - window), -1)
        for i in (*right, *left):
            if i >= 0 and not labels[i] and plain[i] == word:
                labels[i] = True
                place = i
                break
    return labels


def trustworthy(
    triples: Sequence[tuple[Words, Words, Sequence[bool]]], variation: float = 0.05, gap: float = 0.1
) -> list[int]:
    """Indices of pairs whose compression is made of the original's words (LLMLingua-2, section 3.3).

    Args:
        triples: Words of the original, of the compression, and labels.
        variation: Variation rate, at most: the share of compressed words that the original lacks.
        gap: Alignment gap, at most: the hitting rate (share of the original's words that the compression also holds)
            less the matching rate (share of them with a label).
    """
    good = []
    for index, (original, compressed, labels) in enumerate(triples):
        if not original or not compressed:
            continue
        source, target = set(map(_plain, original)), set(map(_plain, compressed))
        varied = sum(_plain(word) not in source for word in compressed) / len(compressed)
        hits = sum(_plain(word) in target for word in original) / len(original)
        # function words occur often and stay once: a hit that another occurrence took is no error, so it weighs less
        missed = (len(compressed) - sum(labels)) / len(original)
        if varied <= variation and min(missed, hits - sum(labels) / len(original)) <= gap:
            good.append(index)
    return good


def _plain(word: str) -> str:
    return word.strip("\"'()[]{}.,;:!?").lower() or word
