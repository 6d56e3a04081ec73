"""Curricula: how hard an example is, and how hard it may be by now.

Platanios et al., "Competence-based Curriculum Learning for Neural Machine Translation" (NAACL 2019), section 2: an
example is drawn from those whose difficulty, as a share of the pool, lies below the competence c(t). Shape legend: n
examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from hf_efficiency.selection.dsir import segment_sums
from hf_efficiency.selection.hashing import buckets, hash_words, in_batches

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

Pace = Literal["linear", "root", "geometric", "step"]
_BUCKETS = 1 << 20


@dataclass(frozen=True)
class Competence:
    """c(t): the share of the examples, easiest first, that may be drawn at a time t.

    Attributes:
        pace: `root` (the paper's equation 8 with p = 2), `linear` (equation 6), `geometric`, or `step` in four stairs.
        start: c(0).
        length: The share of training after which all examples are in.
    """

    pace: Pace = "root"
    start: float = 0.1
    length: float = 0.5

    def __post_init__(self) -> None:
        if self.pace not in ("linear", "root", "geometric", "step"):
            raise ValueError(f"pace={self.pace!r} is unknown: use 'root', 'linear', 'geometric' or 'step'.")
        if not 0 < self.start <= 1:
            raise ValueError(f"start={self.start} is a share of the examples and must lie in (0, 1].")
        if not 0 < self.length <= 1:
            raise ValueError(f"length={self.length} is a share of training and must lie in (0, 1].")

    def __call__(self, time: NDArray[np.floating] | float) -> NDArray[np.float64]:
        """c at times in [0, 1]."""
        t, c0 = np.minimum(np.asarray(time, np.float64) / self.length, 1.0), self.start
        if self.pace == "linear":
            return c0 + (1 - c0) * t
        if self.pace == "root":
            return np.sqrt(c0 * c0 + (1 - c0 * c0) * t)
        if self.pace == "geometric":
            return np.asarray(c0 ** (1 - t))
        return c0 + (1 - c0) * np.floor(4 * t) / 4


def draw_order(difficulty: NDArray[np.floating], competence: NDArray[np.floating], seed: int) -> NDArray[np.int64]:
    """One example for each entry of `competence` (draws,), from those that are easy enough by then.

    Within what is allowed the draw is without replacement until all of it was drawn, so that an epoch at full
    competence is a permutation.

    Args:
        difficulty: (n,) in any unit; NaN is refused by whoever made it.
        competence: Share of the examples allowed at each draw, in (0, 1], not falling.
        seed: Of the draws.
    """
    n = len(difficulty)
    generator = np.random.default_rng(seed)
    by_difficulty = np.argsort(difficulty, kind="stable")
    limits = np.clip(np.ceil(np.asarray(competence) * n), 1, n).astype(np.int64)
    order = np.empty(len(limits), np.int64)
    waiting: list[int] = []  # allowed and not drawn in this round
    opened = 0
    spots = generator.random(len(limits))
    for i, limit in enumerate(limits.tolist()):
        if limit > opened:
            waiting.extend(by_difficulty[opened:limit].tolist())
            opened = limit
        if not waiting:
            waiting.extend(by_difficulty[:opened].tolist())
        place = int(spots[i] * len(waiting))
        order[i] = waiting[place]
        waiting[place] = waiting[-1]
        waiting.pop()
    return order


def length_difficulty(texts: Sequence[str]) -> NDArray[np.float32]:
    """Words of each text, (n,)."""
    parts = [hash_words(part).counts for part in in_batches(texts)]
    return np.concatenate(parts).astype(np.float32) if parts else np.empty(0, np.float32)


def word_counts(batches: Iterable[Sequence[str]]) -> NDArray[np.int64]:
    """How often each of 2^20 buckets of words occurs."""
    counts = np.zeros(_BUCKETS, np.int64)
    for texts in batches:
        for part in in_batches(texts):
            hashes = hash_words(part).hashes
            counts += np.bincount(buckets(hashes, _BUCKETS), minlength=_BUCKETS)
    return counts


def rarity_difficulty(texts: Sequence[str], counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """−Σ ln p(word) of each text under the pool's word frequencies, (n,): the paper's equation 2."""
    surprise = -np.log(np.maximum(counts, 1) / max(1, counts.sum()))
    parts = []
    for part in in_batches(texts):
        words = hash_words(part)
        parts.append(segment_sums(surprise[buckets(words.hashes, _BUCKETS)], words.offsets))
    return np.concatenate(parts).astype(np.float32) if parts else np.empty(0, np.float32)
