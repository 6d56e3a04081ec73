"""Skill-It: mixture weights that follow a graph of skills while training goes on.

Chen et al., "Skill-it! A Data-Driven Skills Framework for Understanding and Training Language Models" (NeurIPS 2023),
Algorithm 1: p ∝ exp(η Σ_τ A L_τ) over a window of the last evaluations. Shape legend: s training skills, e evaluated
skills.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass
class SkillIt:
    """Online weights.

    Attributes:
        graph: A, (s, e), not negative: how far training on skill i lowers the loss of skill j.
        eta: Learning rate of the weights.
        window: Evaluations that are summed.
        losses: The evaluations so far, oldest first, at most `window` of them.
    """

    graph: NDArray[np.floating]
    eta: float = 0.5
    window: int = 3
    losses: deque[list[float]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.graph = check_graph(self.graph)
        if self.eta <= 0:
            raise ValueError(f"eta={self.eta} must be positive.")
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1.")
        self.losses = deque(self.losses, maxlen=self.window)

    def start(self) -> NDArray[np.float64]:
        """Weights before any evaluation, (s,): the softmax of η Σ_j A_ij, as in the first line of Algorithm 1."""
        return _softmax(self.eta * self.graph.sum(1))

    def update(self, losses: Sequence[float]) -> NDArray[np.float64]:
        """Weights after an evaluation with the losses (e,), summing to one, (s,).

        Raises:
            ValueError: a loss is NaN or infinite, or there are not as many as evaluated skills.
        """
        values = np.asarray(losses, np.float64)
        if values.shape != (self.graph.shape[1],):
            raise ValueError(f"{len(values)} losses for a graph of {self.graph.shape[1]} evaluated skills.")
        if not np.isfinite(values).all():
            raise ValueError(f"the loss of skill {int(np.flatnonzero(~np.isfinite(values))[0])} is not finite.")
        self.losses.append(values.tolist())
        return _softmax(self.eta * self.graph @ np.sum(list(self.losses), axis=0))


def check_graph(graph: NDArray[np.floating]) -> NDArray[np.float64]:
    """The graph in float64.

    Raises:
        ValueError: it is no matrix, or an edge is negative, NaN or infinite, or all are zero.
    """
    edges: NDArray[np.float64] = np.asarray(graph, np.float64)
    if edges.ndim != 2:
        raise ValueError(f"the skill graph has the shape {edges.shape}; expected (training skills, evaluated skills).")
    if not np.isfinite(edges).all() or (edges < 0).any() or not edges.any():
        raise ValueError("the edges of the skill graph must be finite, not negative, and not all zero.")
    return edges


def learn_graph(before: Sequence[float], after: NDArray[np.floating]) -> NDArray[np.float64]:
    """The graph from short runs: A_ij = max(0, (L_j before − L_j after training on i alone) / L_j before).

    `Verification.losses` makes both arguments.

    Args:
        before: Losses of the evaluated skills before, (e,).
        after: The same after a few steps on each training skill alone, (s, e).
    """
    start, end = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if end.ndim != 2 or end.shape[1] != len(start):
        raise ValueError(f"losses after training have the shape {end.shape}; expected (training skills, {len(start)}).")
    if not (start > 0).all():
        raise ValueError("the losses before training must be positive.")
    return np.maximum(0.0, (start - end) / start)


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()
