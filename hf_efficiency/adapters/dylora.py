"""Low-rank changes that work at every smaller rank (DyLoRA, Valipour et al. 2023).

Shapes: d_in, d_out features of the layer, r rank, k the rank that is in use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_efficiency.adapters.base import LinearAdapter
from hf_efficiency.adapters.triplet import kaiming_rows_

if TYPE_CHECKING:
    from hf_efficiency.adapters.base import BaseLinear


class NestedRank:
    """The rank that the layers of one adapter use together.

    Args:
        smallest, largest: Bounds of the ranks that are trained; each is as likely as the others.
        used: The rank outside training.
    """

    def __init__(self, smallest: int, largest: int, used: int) -> None:
        self.smallest, self.largest, self.used = smallest, largest, used
        self.drawn = largest

    def draw(self) -> None:
        """Chooses the rank of one forward pass, from torch's generator, which trainers save and restore."""
        self.drawn = int(torch.randint(self.smallest, self.largest + 1, ()).item())


class DyLoRA(LinearAdapter):
    """W' = W + alpha / k * B[:, :k] A[:k], with k drawn anew at each training step (section 3.2, algorithm 1).

    Args:
        base: The layer.
        rank: Shared by the layers of the adapter.
        leads: Whether this layer draws the rank: true of the first layer only. Checkpointed activations stay right,
            because what is computed again starts from the same state of the generator.
        alpha: Of the scale.
        frozen: Whether a step trains row and column k alone instead of all up to k (the paper's second variant).
        dropout: Probability of dropping an input of the change.
    """

    def __init__(
        self, base: BaseLinear, rank: NestedRank, *, leads: bool, alpha: float, frozen: bool, dropout: float
    ) -> None:
        super().__init__()
        self.rank, self.leads, self.alpha, self.frozen = rank, leads, alpha, frozen
        self.a = nn.Parameter(torch.empty(rank.largest, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank.largest))
        kaiming_rows_(self.a)
        self.dropout = nn.Dropout(dropout)

    def delta(self) -> Tensor:
        """The change of the weight at the rank in use, (d_out, d_in)."""
        k = self.rank.used
        return self.alpha / k * self.b[:, :k] @ self.a[:k]

    def forward(self, x: Tensor, output: Tensor, base: BaseLinear) -> Tensor:
        """What the adapter adds to the layer's output (..., d_out)."""
        if self.training and self.leads:
            self.rank.draw()
        k = self.rank.drawn if self.training else self.rank.used
        a, b = self.a[:k], self.b[:, :k]
        if self.training and self.frozen:
            a = torch.cat([a[:-1].detach(), a[-1:]])
            b = torch.cat([b[:, :-1].detach(), b[:, -1:]], dim=1)
        return self.alpha / k * nn.functional.linear(nn.functional.linear(self.dropout(x), a), b)

    def truncate(self, r: int) -> None:
        """Drops the rows of A and columns of B above `r`."""
        self.a.data, self.b.data = self.a.data[:r].clone(), self.b.data[:, :r].clone()
        self.a.grad = self.b.grad = None
