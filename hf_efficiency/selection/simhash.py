"""SimHash: near-duplicates as fingerprints of 64 bits that differ in a few.

Charikar, "Similarity estimation techniques from rounding algorithms" (2002); the search by blocks of bits that must
agree is that of Manku, Jain and Das Sarma, "Detecting near-duplicates for web crawling" (2007). Shape legend: n
documents, w features.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from hf_efficiency.selection.clusters import Clusters
from hf_efficiency.selection.hashing import Grams, in_batches, in_blocks, shingles

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

_BITS = 64
_PAIRS = 1 << 20


@dataclass(frozen=True)
class SimHash:
    """Settings.

    Attributes:
        max_distance: Bits in which the fingerprints of two duplicates may differ (Manku et al.: 3).
        ngram: Words of a feature.
    """

    max_distance: int = 3
    ngram: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.max_distance <= 15:
            raise ValueError(f"max_distance={self.max_distance} must lie between 0 and 15 of 64 bits.")
        if self.ngram < 1:
            raise ValueError(f"ngram={self.ngram} must be at least 1.")

    def fingerprints(self, texts: Sequence[str]) -> NDArray[np.uint64]:
        """Bit i is set where it is set in more than half of the text's features, (n,)."""
        parts = [_fingerprints(shingles(part, self.ngram)) for part in in_batches(texts)]
        return np.concatenate(parts) if parts else np.empty(0, np.uint64)

    def clusters(self, batches: Iterable[Sequence[str]]) -> Clusters:
        """Groups linked by pairs at most `max_distance` bits apart (empty texts stay alone); it holds 8 bytes each."""
        parts = [(self.fingerprints(texts), _with_words(texts)) for texts in batches]
        prints = np.concatenate([part for part, _ in parts]) if parts else np.empty(0, np.uint64)
        filled = np.flatnonzero(np.concatenate([words for _, words in parts])) if parts else np.empty(0, np.int64)
        return self.joined(prints, filled)

    def joined(self, prints: NDArray[np.uint64], rows: NDArray[np.int64]) -> Clusters:
        """Groups of fingerprints (n,); those that are not among `rows` stay alone."""
        clusters = Clusters(len(prints))
        # equal ones are joined at once, and one of each is compared with others
        order = rows[np.argsort(prints[rows], kind="stable")]
        equal = np.concatenate([[False], prints[order[1:]] == prints[order[:-1]]]) if len(order) else np.empty(0, bool)
        for i in np.flatnonzero(equal):
            clusters.join(int(order[i - 1]), int(order[i]))
        rows = np.sort(order[~equal])
        # of max_distance + 1 blocks of bits at least one is free of differences
        edges = np.linspace(0, _BITS, self.max_distance + 2).astype(int)
        for low, high in pairwise(edges):
            block = (prints[rows] >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
            order = rows[np.argsort(block, kind="stable")]
            self._join(clusters, prints, order, np.sort(block))
        return clusters

    def _join(
        self, clusters: Clusters, prints: NDArray[np.uint64], order: NDArray[np.int64], block: NDArray[np.uint64]
    ) -> None:
        """Compares documents `shift` places apart while they share the block."""
        start = np.arange(len(order))
        for shift in range(1, len(order)):
            start = start[start + shift < len(order)]
            start = start[block[start] == block[start + shift]]
            if not len(start):
                return
            for i in range(0, len(start), _PAIRS):
                left, right = order[start[i : i + _PAIRS]], order[start[i : i + _PAIRS] + shift]
                near = np.bitwise_count(prints[left] ^ prints[right]) <= self.max_distance
                for a, b in zip(left[near].tolist(), right[near].tolist(), strict=True):
                    clusters.join(a, b)


def _with_words(texts: Sequence[str]) -> NDArray[np.bool_]:
    return np.fromiter((bool(text.strip()) for text in texts), bool, len(texts))


def _fingerprints(grams: Grams) -> NDArray[np.uint64]:
    result = np.zeros(len(grams), np.uint64)
    for rows, features, starts in in_blocks(grams):
        bits = np.unpackbits(features[:, None].view(np.uint8), axis=1, bitorder="little")  # (w, 64)
        votes = np.add.reduceat(bits.astype(np.int32), starts, axis=0)
        majority = 2 * votes > grams.counts[rows, None]
        result[rows] = np.packbits(majority, axis=1, bitorder="little").view(np.uint64)[:, 0]
    return result
