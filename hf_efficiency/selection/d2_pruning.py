"""D2 pruning: difficulty and diversity by messages over a graph of neighbours.

Maharana, Yadav and Bansal, "D2 Pruning: Message Passing for Balancing Diversity and Difficulty in Data Pruning" (ICLR
2024), section 3. The difficulty here is a loss; the easiest and the hardest rows are cut off first, since the hardest
are often mislabelled. Shape legend: n rows, d features, m neighbours, k chosen.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hf_efficiency.selection.choosing import check_scores

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK = 1024


@dataclass(frozen=True)
class D2:
    """Settings.

    Attributes:
        drop_easy: Share of the pool with the lowest loss that is left out.
        drop_hard: Share with the highest loss that is left out.
        neighbors: Of each row in the graph; 0 for none, where the choice goes by difficulty alone.
        gamma_forward: Rate at which a neighbour's difficulty counts less with its squared distance.
        gamma_reverse: The same for the discount that a chosen row gives its neighbours; smaller means more diverse.
    """

    drop_easy: float = 0.1
    drop_hard: float = 0.3
    neighbors: int = 10
    gamma_forward: float = 1.0
    gamma_reverse: float = 1.0

    def __post_init__(self) -> None:
        if self.drop_easy < 0 or self.drop_hard < 0 or self.drop_easy + self.drop_hard >= 1:
            raise ValueError(
                f"drop_easy={self.drop_easy} and drop_hard={self.drop_hard} are shares of the pool: none may be "
                "negative, and together they must stay below 1."
            )
        if self.neighbors < 0:
            raise ValueError(f"neighbors={self.neighbors} must not be negative.")

    def allowed(self, losses: NDArray[np.floating], k: int) -> NDArray[np.bool_]:
        """The rows between both ends, (n,); the ends shrink together where k asks for more than is left."""
        n, share = len(losses), self.drop_easy + self.drop_hard
        dropped = min(n - k, round(share * n))
        hard = round(dropped * self.drop_hard / share) if share else 0
        easy = dropped - hard
        order = np.argsort(losses, kind="stable")
        kept = np.zeros(n, bool)
        kept[order[easy : n - hard]] = True
        return kept & np.isfinite(losses)

    def choose(self, losses: NDArray[np.floating], k: int, features: NDArray[np.float32] | None) -> NDArray[np.int64]:
        """k rows, in the order of choice.

        Args:
            losses: Difficulty of each row, (n,).
            k: Rows to choose.
            features: (n, d), rows of length one; needed for the graph.
        """
        check_scores(losses)
        if features is None and self.neighbors:
            raise ValueError("D2 pruning needs features for its graph: give them, or set neighbors=0.")
        rows = np.flatnonzero(self.allowed(losses, k))
        if len(rows) < k:
            raise ValueError(f"k={k} is above the {len(rows)} rows of the pool that have a loss.")
        difficulty = losses[rows].astype(np.float64)
        difficulty = difficulty - difficulty.min()
        if features is None or not self.neighbors or len(rows) < 2:
            return rows[np.argsort(-difficulty, kind="stable")[:k]]
        indices, distances = nearest(features[rows], min(self.neighbors, len(rows) - 1))
        passed = difficulty + (np.exp(-self.gamma_forward * distances) * difficulty[indices]).sum(1)
        return rows[self._greedy(passed, indices, np.exp(-self.gamma_reverse * distances), k)]

    def _greedy(
        self, scores: NDArray[np.float64], indices: NDArray[np.int64], weights: NDArray[np.float64], k: int
    ) -> NDArray[np.int64]:
        """Takes the highest and lowers its neighbours by its own score, k times."""
        scores = scores.copy()
        heap = [(-score, i) for i, score in enumerate(scores.tolist())]
        heapq.heapify(heap)
        chosen: list[int] = []
        taken = np.zeros(len(scores), bool)
        while len(chosen) < k:
            score, i = heapq.heappop(heap)
            if taken[i]:
                continue
            if -score > scores[i]:  # lowered since it was put there
                heapq.heappush(heap, (-float(scores[i]), i))
                continue
            taken[i] = True
            chosen.append(i)
            scores[indices[i]] -= weights[i] * scores[i]
        return np.array(chosen, np.int64)


def nearest(features: NDArray[np.float32], m: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The m nearest other rows of each row of length one, (n, m), and their squared distances, (n, m)."""
    n = len(features)
    indices, distances = np.empty((n, m), np.int64), np.empty((n, m))
    for start in range(0, n, _BLOCK):
        sim = features[start : start + _BLOCK] @ features.T
        sim[np.arange(len(sim)), np.arange(start, start + len(sim))] = -np.inf
        part = np.argpartition(-sim, m - 1, axis=1)[:, :m]
        indices[start : start + len(sim)] = part
        distances[start : start + len(sim)] = np.maximum(0, 2 - 2 * np.take_along_axis(sim, part, 1))
    return indices, distances
