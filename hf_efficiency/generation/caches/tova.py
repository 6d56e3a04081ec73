"""TOVA (Oren et al. 2024): drop the token that the newest query attends to least."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_efficiency.generation.caches.policies import Policy


@dataclass
class LastAttention(Policy):
    """A token's score is the newest query's attention, averaged over all heads of the layer (section 3.2)."""

    def scored_queries(self, t: int, prompt: bool) -> int:
        """The newest one."""
        return 1

    def observe(self, scores: Tensor, sums: Tensor, positions: Tensor, newest: int, prompt: bool) -> Tensor:
        """Forgets what was before, protected tokens excepted."""
        return torch.where(scores.isinf(), scores, sums.mean(1, keepdim=True).expand_as(scores))
