"""Low-rank changes whose rank is found by sparse gates (SoRA, Ding et al. 2023).

Shapes: d_in, d_out features of the layer, r rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_efficiency.adapters.base import LinearAdapter
from hf_efficiency.adapters.triplet import Triplet, kaiming_rows_

if TYPE_CHECKING:
    from hf_efficiency.adapters.base import BaseLinear


class SoRA(Triplet, LinearAdapter):
    """W' = W + scale * B diag(g) A (section 3.2); g is made sparse by a proximal step after each optimizer step.

    A starts as LoRA's, B at zero and the gates at standard normal values, as in the authors' program.

    Args:
        base: The layer.
        r: Largest rank.
        scale: What the change is multiplied with.
        dropout: Probability of dropping an input of the change.
    """

    def __init__(self, base: BaseLinear, r: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.make_directions(base, r, scale)
        kaiming_rows_(self.a)
        nn.init.normal_(self.e)
        nn.init.zeros_(self.b)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, output: Tensor, base: BaseLinear) -> Tensor:
        """What the adapter adds to the layer's output (..., d_out)."""
        return self.product(self.dropout(x))

    @property
    def gates(self) -> nn.Parameter:
        """g, (r,). A direction whose gate is zero is pruned."""
        return self.e

    @torch.no_grad()
    def proximal_step(self, threshold: float) -> None:
        """Moves every gate towards zero by `threshold` and stops there: the proximal map of the L1 norm (equation 6).

        `threshold` is the learning rate times lambda.
        """
        self.gates.copy_(nn.functional.softshrink(self.gates, threshold))
