"""Facility location: rows that represent all others, by lazy greedy.

f(S) = Σ_i max_{j ∈ S} sim(i, j) is monotone and submodular, so greedy is within 1 − 1/e of the best (Nemhauser et al.
1978), and an old gain bounds a new one, so that few are computed anew (Minoux 1978). Shape legend: n rows, d features,
k chosen.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A similarity matrix of this many rows takes 1 GiB; larger pools are split.
_WHOLE = 16_384


def facility_location(
    features: NDArray[np.float32],
    k: int,
    *,
    quality: NDArray[np.floating] | None = None,
    seed: int = 0,
    part_rows: int = _WHOLE,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """k rows and what each added to f, both in the order of choice.

    Args:
        features: (n, d), rows of length one; the similarity is (1 + cosine) / 2.
        k: Rows to choose.
        quality: (n,) not negative; is added to a row's gain.
        seed: How a pool of more than `part_rows` rows is split: each part offers its k best, and the final k are chosen
            among these (GreeDi, Mirzasoleiman et al. 2013).
        part_rows: Largest similarity matrix.
    """
    n = len(features)
    if n <= part_rows:
        return lazy_greedy(similarity(features), k, quality)
    order = np.random.default_rng(seed).permutation(n)
    offers = []
    for part in np.array_split(order, -(-n // part_rows)):
        own = None if quality is None else quality[part]
        offers.append(part[lazy_greedy(similarity(features[part]), min(k, len(part)), own)[0]])
    candidates = np.sort(np.concatenate(offers))
    if len(candidates) > part_rows:  # k is large: the parts' own shares
        shares = [offer[: -(-k // len(offers))] for offer in offers]
        return np.concatenate(shares)[:k].astype(np.int64), np.ones(k)
    chosen, gains = lazy_greedy(similarity(features[candidates]), k, None if quality is None else quality[candidates])
    return candidates[chosen], gains


def similarity(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """(1 + cosine) / 2 of all pairs, (n, n)."""
    features = np.asarray(features, np.float32)
    result = features @ features.T
    result += 1
    result *= 0.5
    return result


def lazy_greedy(
    sim: NDArray[np.float32], k: int, quality: NDArray[np.floating] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Greedy choice over a symmetric matrix of similarities (n, n) that are not negative."""
    covered = np.zeros(len(sim), np.float32)
    ones = np.ones_like(covered)
    extra = [0.0] * len(sim) if quality is None else np.asarray(quality, np.float64).tolist()
    heap = [(-bound - extra[i], i) for i, bound in enumerate((sim @ ones).tolist())]
    heapq.heapify(heap)
    chosen: list[int] = []
    gains: list[float] = []
    scratch = np.empty_like(covered)
    while len(chosen) < k:
        i = heap[0][1]
        np.maximum(sim[i], covered, out=scratch)
        np.subtract(scratch, covered, out=scratch)
        gain = float(scratch @ ones) + extra[i]
        heapq.heapreplace(heap, (-gain, i))
        # still on top: the bounds of all others, which their gains cannot exceed, are lower
        if heap[0][1] == i:
            heapq.heappop(heap)
            chosen.append(i)
            gains.append(gain)
            np.maximum(covered, sim[i], out=covered)
    return np.array(chosen, np.int64), np.array(gains)
