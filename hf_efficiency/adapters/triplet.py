"""A change of a weight as a sum of singular directions, any of which can be taken out.

Shapes: ... any leading dimensions, d_in, d_out features of the layer, r rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hf_efficiency.adapters.base import BaseLinear


class Directions(NamedTuple):
    """The trained tensors of B diag(e) A."""

    e: nn.Parameter  # (r,) or (r, 1)
    a: nn.Parameter  # (r, d_in)
    b: nn.Parameter  # (d_out, r)


class Triplet(nn.Module):
    """Gives an adapter the change B diag(e) A times a fixed scale, with r + r (d_in + d_out) trained numbers.

    The parameters are the adapter's own, not a module's inside it: transformers' `load_adapter` finds no deeper ones.
    """

    def make_directions(self, base: BaseLinear, r: int, scale: float) -> None:
        """Adds the parameters, without values.

        Args:
            base: The layer.
            r: Rank.
            scale: What the product is multiplied with. It does not follow the rank, so that taking out a direction
                that is zero changes nothing.
        """
        self.scale = scale
        self.a = nn.Parameter(torch.empty(r, base.in_features))
        self.e = nn.Parameter(torch.empty(r))
        self.b = nn.Parameter(torch.empty(base.out_features, r))

    @property
    def directions(self) -> Directions:
        """The three parameters."""
        return Directions(self.e, self.a, self.b)

    def delta(self) -> Tensor:
        """The change of the weight, (d_out, d_in)."""
        return self.scale * (self.b * self.e) @ self.a

    def product(self, x: Tensor) -> Tensor:
        """x (..., d_in) times the change, (..., d_out), through the rank."""
        return self.scale * nn.functional.linear(nn.functional.linear(x, self.a) * self.e, self.b)

    @torch.no_grad()
    def keep(self, rows: Tensor) -> list[tuple[nn.Parameter, int]]:
        """Takes all directions out but those of the mask `rows` (r,). The parameters stay the same objects.

        Returns:
            Each parameter and its dimension that was cut, for whoever holds more tensors of these shapes.
        """
        cut = [(self.a, 0), (self.e, 0), (self.b, 1)]
        for parameter, dim in cut:
            parameter.data = parameter.data.index_select(dim, rows.nonzero()[:, 0].to(parameter.device))
            parameter.grad = None
        return cut


def kaiming_rows_(a: Tensor) -> None:
    """LoRA's start of A: uniform with bound 1 / sqrt(d_in). An A without rows is left alone."""
    if a.numel():
        bound = 1 / math.sqrt(a.shape[1])
        nn.init.uniform_(a, -bound, bound)
