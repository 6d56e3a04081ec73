"""Features of texts: hashed n-grams with tf-idf weights, projected to a few dimensions.

Shape legend: n documents, d features, m buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hf_efficiency.selection.hashing import buckets, flat_runs, in_batches, mix

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

_BUCKETS = 1 << 18


@dataclass(frozen=True)
class HashedText:
    """Settings.

    Attributes:
        dim: Features; each n-gram is added to `spread` of them with a sign (a sparse random projection).
        max_n: Longest n-gram in words.
        spread: Features that an n-gram touches.
    """

    dim: int = 128
    max_n: int = 2
    spread: int = 4

    def __post_init__(self) -> None:
        for name, value in (("dim", self.dim), ("max_n", self.max_n), ("spread", self.spread)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")

    def weights(self, batches: Iterable[Sequence[str]]) -> NDArray[np.float32]:
        """Inverse document frequency ln((1 + N) / (1 + df)) + 1 of each bucket, (m,)."""
        frequency, documents = np.zeros(_BUCKETS, np.int64), 0
        for texts in batches:
            for part in in_batches(texts):
                documents += len(part)
                rows, places, _ = self._entries(part)
                pairs = np.unique(rows * _BUCKETS + places)
                frequency += np.bincount(pairs % _BUCKETS, minlength=_BUCKETS)
        return (np.log((1 + documents) / (1 + frequency)) + 1).astype(np.float32)

    def embed(self, texts: Sequence[str], weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features of each text, (n, d), of length one; zero for a text without words."""
        parts = [self._embed(part, weights) for part in in_batches(texts)]
        return np.concatenate(parts) if parts else np.empty((0, self.dim), np.float32)

    def _embed(self, texts: Sequence[str], weights: NDArray[np.float32]) -> NDArray[np.float32]:
        rows, places, hashes = self._entries(texts)
        values = weights[places]
        flat = np.zeros(len(texts) * self.dim)
        for i in range(self.spread):
            code = mix(hashes + np.uint64(i + 1))
            place = rows * self.dim + buckets(code, self.dim)
            sign = np.where(code >> np.uint64(63), 1.0, -1.0)
            flat += np.bincount(place, sign * values, minlength=len(flat))
        return normalized(flat.reshape(len(texts), self.dim).astype(np.float32))

    def _entries(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
        rows, hashes = flat_runs(texts, self.max_n)
        return rows, buckets(hashes, _BUCKETS), hashes


def normalized(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length one; zero rows stay."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return (features / np.where(length > 0, length, 1)).astype(np.float32)
