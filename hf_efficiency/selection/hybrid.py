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


def combined(scores: Mapping[str, NDArray[np.floating]], weights: Mapping[str, float]) -> NDArray[np.float64]:
    """The weighted mean of the scores' ranks over [0, 1], (n,). A negative weight prefers low scores.

    Raises:
        ValueError: weights and scores that do not match, or no weight that counts.
    """
    if set(scores) != set(weights) or not scores:
        raise ValueError(f"the weights name {sorted(weights)}, the scores {sorted(scores)}: both must be the same.")
    total = sum(abs(weight) for weight in weights.values())
    if not total:
        raise ValueError("all weights are zero: give at least one score a weight.")
    return np.sum([weights[name] * ranks(np.asarray(scores[name], np.float64)) for name in scores], axis=0) / total


def choose_diverse(
    scores: NDArray[np.floating], k: int, features: NDArray[np.float32], diversity: float
) -> NDArray[np.int64]:
    """k rows in the order of choice, by maximal marginal relevance (Carbonell and Goldstein 1998).

    Each has the largest (1 − λ) · score − λ · cosine with the nearest row that is chosen already; λ is `diversity`.

    Raises:
        ValueError: `diversity` is out of [0, 1).
    """
    if not 0 <= diversity < 1:
        raise ValueError(f"diversity={diversity} must lie in [0, 1).")
    rows = top_k(scores, min(int((scores > -np.inf).sum()), max(k, _CANDIDATES * k)))
    gain, x = scores[rows], features[rows]
    closest = np.full(len(rows), -1.0)
    free = np.ones(len(rows), bool)
    chosen = np.empty(k, np.int64)
    for step in range(k):
        value = (1 - diversity) * gain - diversity * closest
        best = int(np.argmax(np.where(free, value, -np.inf)))
        chosen[step], free[best] = rows[best], False
        closest = np.maximum(closest, x @ x[best])
    return chosen
