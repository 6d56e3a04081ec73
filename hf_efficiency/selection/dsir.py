"""DSIR: data selection by importance resampling over hashed n-grams.

Xie et al., "Data Selection for Language Models via Importance Resampling" (NeurIPS 2023), section 3. Two departures:
the log-ratio of a document is the mean over its n-grams and not the sum, which ranks by length where documents differ
in it; and the target's distribution is smoothed with the pool's (Jelinek and Mercer 1980), so that what the target
lacks counts against a document only so far, and what it shares decides. Shape legend: n documents, m buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hf_efficiency.selection.hashing import buckets, in_batches, runs_up_to

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True)
class DSIR:
    """Settings of the bag of hashed n-grams.

    Attributes:
        max_n: n-grams of 1 to `max_n` words share the buckets.
        buckets: Of the hash table (the paper: 10,000).
        smoothing: Added to the count of every bucket.
        share: Of the target's own distribution in the smoothed one, p' = share · p_target + (1 − share) · p_pool; 1 is
            the paper's ratio.
    """

    max_n: int = 2
    buckets: int = 100_000
    smoothing: float = 1.0
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.max_n < 1:
            raise ValueError(f"max_n={self.max_n} must be at least 1.")
        if self.buckets < 2:
            raise ValueError(f"buckets={self.buckets} must be at least 2.")
        if self.smoothing <= 0:
            raise ValueError(f"smoothing={self.smoothing} must be positive, or unseen n-grams have no logarithm.")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must lie in (0, 1].")

    def count(self, batches: Iterable[Sequence[str]]) -> NDArray[np.int64]:
        """How often each bucket is hit, (m,)."""
        total = np.zeros(self.buckets, np.int64)
        for texts in batches:
            for part in in_batches(texts):
                for grams in runs_up_to(part, self.max_n):
                    total += np.bincount(buckets(grams.hashes, self.buckets), minlength=self.buckets)
        return total

    def log_ratio(self, target: NDArray[np.int64], pool: NDArray[np.int64]) -> NDArray[np.float64]:
        """ln p'_target − ln p_pool of each bucket, (m,), from the counts of both."""
        target_counts, pool_counts = target + self.smoothing, pool + self.smoothing
        ratio = (target_counts / target_counts.sum()) / (pool_counts / pool_counts.sum())
        return np.log(1 - self.share + self.share * ratio)

    def score(self, texts: Sequence[str], log_ratio: NDArray[np.float64]) -> NDArray[np.float32]:
        """Mean log-ratio over the n-grams of each text, (n,); minus infinity for a text without words."""
        parts = []
        for part in in_batches(texts):
            sums, counts = np.zeros(len(part)), np.zeros(len(part), np.int64)
            for grams in runs_up_to(part, self.max_n):
                sums += segment_sums(log_ratio[buckets(grams.hashes, self.buckets)], grams.offsets)
                counts += grams.counts
            with np.errstate(divide="ignore", invalid="ignore"):
                parts.append(np.where(counts > 0, sums / counts, -np.inf))
        return np.concatenate(parts).astype(np.float32) if parts else np.empty(0, np.float32)


def segment_sums(values: NDArray[np.floating], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums of `values` over each document, (n,); zero for one that has none."""
    prefix = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return prefix[offsets[1:]] - prefix[offsets[:-1]]
