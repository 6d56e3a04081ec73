"""Determinantal point process: a diverse subset of rows of high quality.

P(S) ∝ det(L_S) with L = diag(q) · K · diag(q), K the Gram matrix of the features (Kulesza and Taskar 2012); the greedy
MAP subset by incremental Cholesky as in Chen, Zhang and Zhou, "Fast greedy MAP inference for determinantal point
process" (NeurIPS 2018), Algorithm 1. Shape legend: n rows, d features, k chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_RIDGE = 1e-3  # on the diagonal of K, so that more rows than features can be chosen
_TINY = 1e-12


def greedy_map(
    features: NDArray[np.floating], k: int, *, quality: NDArray[np.floating] | None = None, ridge: float = _RIDGE
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """k rows and the gain in log det that each brought, in the order of choice. Memory: n × k floats.

    Args:
        features: (n, d), rows of length one.
        k: Rows to choose.
        quality: (n,) positive, the q above; 1 by default.
        ridge: Added to the diagonal of K.

    Raises:
        ValueError: a quality is not positive.
    """
    x = np.asarray(features, np.float32)
    n = len(x)
    q = np.ones(n, np.float32) if quality is None else np.asarray(quality, np.float32)
    if not (q > 0).all():
        raise ValueError(f"quality must be positive for a determinantal point process; the smallest is {q.min()}.")
    x = x * q[:, None]
    remaining = np.einsum("nd,nd->n", x, x) + ridge * q * q  # squared diagonal still to be explained
    factor = np.zeros((k, n), np.float32)  # the Cholesky rows of the chosen
    free = np.ones(n, bool)
    chosen, gains = np.empty(k, np.int64), np.empty(k)
    for step in range(k):
        best = int(np.argmax(np.where(free, remaining, -np.inf)))
        pivot = max(float(remaining[best]), _TINY)
        chosen[step], gains[step] = best, np.log(pivot)
        free[best] = False
        row = x @ x[best]
        row[best] += ridge * q[best] ** 2
        row -= factor[:step, best] @ factor[:step]
        row /= np.sqrt(pivot)
        factor[step] = row
        remaining = np.maximum(remaining - row * row, 0)
    return chosen, gains
