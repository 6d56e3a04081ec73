"""Adapters whose delta is made as a whole matrix, without holding it between the forward and the backward pass.

Shapes: ... any leading dimensions, d_in, d_out features of the layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_efficiency.adapters.base import LinearAdapter

if TYPE_CHECKING:
    from hf_efficiency.adapters.base import BaseLinear


class DenseDeltaAdapter(LinearAdapter):
    """An adapter that multiplies its input by the dense delta, which the backward pass makes again."""

    def forward(self, x: Tensor, output: Tensor, base: BaseLinear) -> Tensor:
        """What the adapter adds to the layer's output (..., d_out)."""
        known: dict[str, float] = {}  # what the forward pass found out and the backward pass needs not repeat

        def product(x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.dense_delta(known).to(x.dtype))

        if not torch.is_grad_enabled():
            return product(x)
        added: Tensor = checkpoint(product, x, use_reentrant=False, preserve_rng_state=False)
        return added

    def delta(self) -> Tensor:
        """What merging adds to the weight, (d_out, d_in)."""
        return self.dense_delta({})

    def dense_delta(self, known: dict[str, float]) -> Tensor:
        """The delta (d_out, d_in).

        Args:
            known: Constants of the backward pass: empty at first, the same dictionary when the delta is made again.
        """
        raise NotImplementedError
