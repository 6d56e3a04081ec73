"""SnapKV (Li et al. 2024): after the prompt, keep what its last tokens attend to, neighbours included."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_efficiency.generation.caches.budget import Budget
from hf_efficiency.generation.caches.policies import Policy


@dataclass
class ObservationWindow(Policy):
    """Each prompt's last `recent` tokens vote by their attention (section 4.1).

    The votes are averaged over neighbouring tokens, so that a span stays together. Tokens generated later all
    stay.

    Attributes:
        recent: The observation window.
        kernel_size: Neighbours that are averaged, odd.
    """

    recent: Budget = 32
    kernel_size: int = 5

    evicts_while_decoding = False

    def __post_init__(self) -> None:
        if not isinstance(self.recent, int) or self.recent < 1:
            raise ValueError(f"The observation window is {self.recent!r}: give a number of tokens, at least 1.")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}: give an odd number, so that it has a middle.")

    def scored_queries(self, t: int, prompt: bool) -> int:
        """The observation window."""
        return min(t, int(self.recent)) if prompt else 0

    def observe(self, scores: Tensor, sums: Tensor, positions: Tensor, newest: int, prompt: bool) -> Tensor:
        """Pools over neighbours; the window's own tokens take no part."""
        votes = torch.where(positions > newest - self.recent, 0.0, sums)
        pooled = F.avg_pool1d(votes, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return torch.where(scores.isinf(), scores, pooled)
