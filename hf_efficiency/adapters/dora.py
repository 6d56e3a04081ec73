"""Weights as magnitude times direction (DoRA, Liu et al. 2024, section 4), for any adapter that changes the direction.

Shapes: d_in, d_out features of the layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_efficiency.adapters.base import LinearAdapter

if TYPE_CHECKING:
    from hf_efficiency.adapters.base import BaseLinear


class DirectionAdapter(LinearAdapter):
    """W' = m * (W + delta) / |W + delta|, with a norm and a learned magnitude for each output (equation 5).

    A subclass gives `delta`, and `change`, the product of its input with it.

    Args:
        weight: The dense weight (d_out, d_in) at the beginning; the magnitude starts as its norms.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.magnitude = nn.Parameter(_norms(weight))

    def change(self, x: Tensor) -> Tensor:
        """x times the delta, (..., d_out), without making the delta."""
        return nn.functional.linear(x, self.delta())

    def forward(self, x: Tensor, output: Tensor, base: BaseLinear) -> Tensor:
        """What the adapter adds to the layer's output (..., d_out)."""
        scale = (self.magnitude / self._norms(base.weight())).to(x.dtype)
        plain = output if base.bias is None else output - base.bias
        return (scale - 1) * plain + scale * self.change(x)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The weight of the adapted layer; the norms stay, so that it can be taken apart again."""
        self._merged_norms = self._norms(weight)
        scale = (self.magnitude / self._merged_norms)[:, None]
        return (scale * (weight + self.delta())).to(weight.dtype)

    def unmerged_weight(self, weight: Tensor) -> Tensor:
        """The weight of the layer alone."""
        scale = (self.magnitude / self._merged_norms)[:, None]
        return (weight / scale - self.delta()).to(weight.dtype)

    @torch.no_grad()
    def _norms(self, weight: Tensor) -> Tensor:
        """The norms of W + delta. They count as constants in the backward pass (section 4.3)."""
        return _norms(weight.to(self.magnitude.dtype) + self.delta())


def _norms(weight: Tensor) -> Tensor:
    precision = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=precision).to(weight.dtype)
