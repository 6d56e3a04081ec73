"""BitFit: only biases are trained (Ben Zaken et al. 2022).

Shapes: d_out features of the layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_efficiency.adapters.base import LinearAdapter

if TYPE_CHECKING:
    from hf_efficiency.adapters.base import BaseLinear


class BitFit(LinearAdapter):
    """What is added to the bias of a layer: d_out trained numbers, which start at zero.

    Training the difference is training the bias, but that weight decay draws to the pretrained bias and that several
    adapters can be active.
    """

    def __init__(self, d_out: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor, output: Tensor, base: BaseLinear | None) -> Tensor:
        """What the adapter adds to the layer's output, (d_out,)."""
        return self.bias
