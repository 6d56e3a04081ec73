"""What an eviction policy is, and the choice that all of them share.

Shape legend: b batch, k key-value heads, n slots, t new tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_efficiency.generation.caches.budget import Budget


@dataclass
class Policy:
    """Which tokens a cache keeps: those of highest score, and the most recent ones always.

    Attributes:
        recent: The newest tokens that always stay, as tokens or as a fraction of the budget.
    """

    recent: Budget = 0

    # Whether tokens leave while single tokens are decoded, or only after a prompt.
    evicts_while_decoding = True

    def scored_queries(self, t: int, prompt: bool) -> int:
        """Of how many of the last of t queries the attention must be summed."""
        return 0

    def begin(self, ranks: Tensor, shape: tuple[int, int, int], layer: int) -> Tensor:
        """Scores (b, k, t) of new tokens whose places in their rows' text are ranks (b, t)."""
        return torch.zeros(shape, device=ranks.device)

    def observe(self, scores: Tensor, sums: Tensor, positions: Tensor, newest: int, prompt: bool) -> Tensor:
        """The scores after a step.

        Args:
            scores: (b, k, n).
            sums: (b, k, n), the attention that each token received from the scored queries and the group's heads.
            positions: (b, k, n), ascending after a prompt; -1 where a slot is empty.
            newest: Position of the newest token.
            prompt: Whether the step was a prompt.
        """
        return scores

    def recent_tokens(self, capacities: list[int]) -> list[int]:
        """Of each row, how many of the newest tokens stay."""
        if isinstance(self.recent, int):
            return [min(self.recent, capacity) for capacity in capacities]
        return [int(self.recent * capacity) for capacity in capacities]


def protect(scores: Tensor, kept: Tensor) -> Tensor:
    """Scores with infinity where `kept`: such tokens never leave while the budget holds them."""
    return torch.where(kept, torch.inf, scores)


def with_recent(scores: Tensor, positions: Tensor, newest: int, recent: Tensor) -> Tensor:
    """Scores (b, k, n) with the newest `recent` (b,) tokens protected."""
    return protect(scores, positions > newest - recent.view(-1, 1, 1))


def choose(scores: Tensor, alive: Tensor, capacity: Tensor, excess: int | None = None) -> Tensor:
    """The slots to keep: in each head the `capacity` tokens of highest score.

    Args:
        scores: (b, k, n).
        alive: (b, k, n), the slots that hold a token.
        capacity: (b,) int64.
        excess: At most so many tokens are too many, where the caller knows; 1 avoids a sort.

    Returns:
        (b, k, n) bool. Of equal scores the older slots stay.
    """
    ranked = torch.where(alive, scores, -torch.inf)
    if excess == 1:
        # The last of the lowest, as the stable sort below.
        lowest = ranked.masked_fill(~alive, torch.inf).flip(2).argmin(2, keepdim=True)
        over = alive.sum(2, keepdim=True) > capacity.view(-1, 1, 1)
        leaves = torch.zeros_like(alive).scatter(2, alive.shape[2] - 1 - lowest, over)
        # Where every token is protected, `argmin` may point at an empty slot.
        return alive & ~leaves
    order = ranked.argsort(dim=2, descending=True, stable=True)
    places = torch.empty_like(order).scatter(
        2, order, torch.arange(order.shape[2], device=order.device).expand_as(order)
    )
    return alive & (places < capacity.view(-1, 1, 1))
