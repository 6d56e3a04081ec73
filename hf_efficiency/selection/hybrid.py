"""Quality, difficulty and diversity in one choice, by weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hf_efficiency.selection.choosing import ranks, top_k

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

# The marginal gain of a row's diversity is looked at for this many times k of the best rows, no more.
_CANDIDATES = 20


def hybrid_choice(
    scores: Mapping[str, NDArray[np.floating]],
    weights: Mapping[str, float],
    k: int,
    *,
    features: NDArray[np.float32] | None = None,
    diversity: float = 0.0,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """k rows in the order of choice, and the weighted score of all rows, (n,).

    Each score is replaced by its rank over [0, 1]; these are added by weight (a negative weight prefers low scores).
    With `diversity` λ the choice is by maximal marginal relevance, (1 − λ) · score − λ · the largest cosine with a row
    that is chosen already (Carbonell and Goldstein 1998).

    Raises:
        ValueError: a weight without a score, a score without a weight, or `diversity` out of [0, 1) or without features.
    """
    if set(scores) != set(weights) or not scores:
        raise ValueError(f"the weights name {sorted(weights)}, the scores {sorted(scores)}: both must be the same.")
    if not 0 <= diversity < 1:
        raise ValueError(f"diversity={diversity} must lie in [0, 1).")
    total = sum(abs(weight) for weight in weights.values())
    if not total:
        raise ValueError("all weights are zero: give at least one score a weight.")
    parts = [weights[name] * ranks(np.asarray(scores[name], np.float64)) for name in scores]
    joined = np.sum(parts, axis=0) / total
    if not diversity:
        return top_k(joined, k), joined
    if features is None:
        raise ValueError("diversity needs features of the rows.")
    rows = top_k(joined, min(len(joined), _CANDIDATES * k))
    gain, x = joined[rows], features[rows]
    closest = np.full(len(rows), -1.0)
    free = np.ones(len(rows), bool)
    chosen = np.empty(k, np.int64)
    for step in range(k):
        value = (1 - diversity) * gain - diversity * closest
        best = int(np.argmax(np.where(free, value, -np.inf)))
        chosen[step], free[best] = rows[best], False
        closest = np.maximum(closest, x @ x[best])
    return chosen, joined
