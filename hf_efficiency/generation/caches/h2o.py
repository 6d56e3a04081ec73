"""H2O (Zhang et al. 2023): keep the tokens that received most attention so far, and the most recent ones."""

from dataclasses import dataclass

from torch import Tensor

from hf_efficiency.generation.caches.budget import Budget
from hf_efficiency.generation.caches.policies import Policy


@dataclass
class HeavyHitters(Policy):
    """A token's score is the attention it received from all queries since it came (section 4.2, algorithm 1).

    Each key-value head counts the attention of its own query heads. Half of the budget is for recent tokens, as in the
    paper's experiments.
    """

    recent: Budget = 0.5

    def scored_queries(self, t: int, prompt: bool) -> int:
        """All of them."""
        return t

    def observe(self, scores: Tensor, sums: Tensor, positions: Tensor, newest: int, prompt: bool) -> Tensor:
        """Accumulates."""
        return scores + sums
