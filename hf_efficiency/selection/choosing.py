"""From scores to chosen rows. Shape legend: n rows of the pool, k chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def check_k(k: int | float | None, n: int, *, what: str = "k") -> int:
    """The number of rows that `k` stands for: a count, or a share of the pool if it is a float of at most 1.

    Raises:
        TypeError: it is no number.
        ValueError: it is below one row or above the pool.
    """
    if isinstance(k, bool) or not isinstance(k, int | float | np.integer | np.floating):
        raise TypeError(f"{what}={k!r} must be a number of rows (an int) or a share of the pool (a float).")
    if isinstance(k, float | np.floating):
        if not 0 < k <= 1:
            raise ValueError(f"{what}={k} is a share of the pool and must lie in (0, 1]; a number of rows is an int.")
        return max(1, round(float(k) * n))
    if k < 1:
        raise ValueError(f"{what}={k} must be at least 1.")
    if k > n:
        raise ValueError(f"{what}={k} is above the pool of {n} rows: choose at most {n}, or add data.")
    return int(k)


def check_scores(scores: NDArray[np.floating], what: str = "scores") -> None:
    """ValueError if a score is NaN. Minus infinity is allowed and stands for a row that must never be chosen."""
    bad = np.flatnonzero(np.isnan(scores))
    if len(bad):
        raise ValueError(
            f"{what} holds NaN for {len(bad)} of {len(scores)} rows (first: row {bad[0]}): the model's logits overflow "
            "or the row is broken. Load the model in float32 or bfloat16, or remove the row."
        )


def top_k(scores: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """The k rows of the highest scores, best first; of equal ones the earlier row.

    Raises:
        ValueError: a score is NaN, or fewer than k rows may be chosen.
    """
    check_scores(scores)
    allowed = int((scores > -np.inf).sum())
    if k > allowed:
        raise ValueError(
            f"k={k} is above the {allowed} rows that may be chosen: the other {len(scores) - allowed} of the pool are "
            "empty or were thrown out. Lower k, or widen the strategy's limits."
        )
    if k < len(scores) // 4:  # sort a few, not all
        bound = np.partition(scores, len(scores) - k)[len(scores) - k]
        candidates = np.flatnonzero(scores >= bound)
    else:
        candidates = np.arange(len(scores))
    return candidates[np.argsort(-scores[candidates], kind="stable")][:k].astype(np.int64)


def gumbel_top_k(log_weights: NDArray[np.floating], k: int, seed: int, temperature: float = 1.0) -> NDArray[np.int64]:
    """k rows drawn without replacement in proportion to exp(log_weights / temperature).

    The top k of log-weights with Gumbel noise: Kool et al. 2019, and section 3 of DSIR (Xie et al. 2023). At
    temperature 0 these are the k largest.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must not be negative (0 takes the k largest).")
    noise = np.random.default_rng(seed).gumbel(size=len(log_weights)) if temperature else 0.0
    return top_k(np.asarray(log_weights, np.float64) + temperature * noise, k)


def quantile_band(scores: NDArray[np.floating], low: float, high: float) -> NDArray[np.bool_]:
    """Which rows lie between two quantiles of the finite scores, (n,).

    Raises:
        ValueError: the quantiles are out of order or out of [0, 1], or a score is NaN.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"the band from low={low} to high={high} must satisfy 0 <= low < high <= 1.")
    check_scores(scores)
    finite = np.isfinite(scores)
    if not finite.any():
        return np.zeros(len(scores), bool)
    lower, upper = np.quantile(scores[finite], [low, high])
    return finite & (scores >= lower) & (scores <= upper)


def ranks(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Scores as their ranks over [0, 1], equal scores sharing one, so that scores of different units can be added."""
    check_scores(scores)
    order = np.argsort(scores, kind="stable")
    _, first, inverse, counts = np.unique(scores[order], return_index=True, return_inverse=True, return_counts=True)
    result = np.empty(len(scores))
    result[order] = (first + (counts - 1) / 2)[inverse]
    return result / max(1, len(scores) - 1)


def draw(allowed: NDArray[np.bool_], k: int, seed: int) -> NDArray[np.int64]:
    """k of the allowed rows, each as likely, in the order of the pool."""
    noise = np.random.default_rng(seed).random(len(allowed))
    return np.sort(top_k(np.where(allowed, noise, -np.inf), k))
