"""UtiliMax: mixture weights from the utility of each source and its size, as a linear programme.

Held et al., "Optimizing Pretraining Data Mixtures with LLM-Estimated Utility" (2025): sources are a portfolio; what a
source brings is its utility for the evaluated tasks, and how much of it may be used is bounded by its size times the
epochs that repeated data are still worth. Shape legend: s sources, e tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hf_efficiency.selection.optional import require

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class UtiliMax:
    """Settings.

    Attributes:
        max_epochs: How often a source may be repeated (Muennighoff et al. 2023: up to four times costs little).
        balance: Weight of the worst task against the mean over tasks, in [0, 1]. The paper's programme is quadratic and
            spreads risk by a penalty; the worst task keeps this one linear and spreads it too.
        min_weight: Least share of every source.
    """

    max_epochs: float = 4.0
    balance: float = 0.5
    min_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.max_epochs <= 0:
            raise ValueError(f"max_epochs={self.max_epochs} must be positive.")
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance={self.balance} must lie in [0, 1].")
        if not 0 <= self.min_weight < 1:
            raise ValueError(f"min_weight={self.min_weight} must lie in [0, 1).")

    def weights(self, utility: NDArray[np.floating], sizes: NDArray[np.floating], budget: float) -> NDArray[np.float64]:
        """Shares of the sources, (s,): they sum to one and maximise (1 − balance) · mean + balance · min over tasks.

        Args:
            utility: (s, e) or (s,); higher is better.
            sizes: Tokens or rows of each source, (s,).
            budget: Tokens or rows of the training.

        Raises:
            ImportError: SciPy is missing.
            ValueError: shapes that do not match, NaN, or a budget that the sources cannot fill.
        """
        u, n = np.asarray(utility, np.float64), np.asarray(sizes, np.float64)
        u = u[:, None] if u.ndim == 1 else u
        if u.ndim != 2 or n.shape != (len(u),):
            raise ValueError(f"utility has the shape {u.shape} and sizes {n.shape}: expected (s, tasks) and (s,).")
        if not np.isfinite(u).all() or not (n > 0).all() or not budget > 0:
            raise ValueError("utilities must be finite, and sizes and the budget positive.")
        caps = np.minimum(1.0, self.max_epochs * n / budget)
        if caps.sum() < 1 - 1e-9:
            raise ValueError(
                f"the budget of {budget:g} is above {n.sum():g} in all sources times max_epochs={self.max_epochs:g}: "
                "lower the budget, add data, or raise max_epochs."
            )
        if (caps < self.min_weight).any() or self.min_weight * len(n) > 1:
            raise ValueError(f"min_weight={self.min_weight} is more than each of {len(n)} sources can give.")
        optimize = require("scipy.optimize", "UtiliMax")
        tasks = u.shape[1]
        # variables: the shares, and the utility of the worst task
        objective = -np.append((1 - self.balance) * u.mean(1), self.balance)
        worst = np.concatenate([-u.T, np.ones((tasks, 1))], axis=1)
        bounds = [*((self.min_weight, cap) for cap in caps), (None, None)]
        total = np.append(np.ones(len(n)), 0.0)[None]
        done = optimize.linprog(objective, worst, np.zeros(tasks), total, [1.0], bounds, method="highs")
        if not done.success:
            raise ValueError(f"the linear programme has no solution: {done.message}")
        shares = np.maximum(done.x[:-1], 0)
        return shares / shares.sum()
