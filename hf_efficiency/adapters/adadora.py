"""AdaLoRA's singular directions in DoRA's direction.

Shapes: d_in, d_out features of the layer, r rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from hf_efficiency.adapters.dora import DirectionAdapter
from hf_efficiency.adapters.triplet import Triplet

if TYPE_CHECKING:
    from hf_efficiency.adapters.base import BaseLinear


class AdaDoRA(Triplet, DirectionAdapter):
    """W' = m * (W + scale * B diag(e) A) / |W + scale * B diag(e) A|.

    DoRA's magnitude (Liu et al. 2024, equation 5) around AdaLoRA's change (Zhang et al. 2023, equation 3): e starts at
    zero, A and B at normal values of deviation 0.02. `rank_allocation` decides which directions stay.

    Args:
        base: The layer.
        r: Rank at the beginning.
        scale: What the change is multiplied with.
        dropout: Probability of dropping an input of the change.
    """

    def __init__(self, base: BaseLinear, r: int, scale: float, dropout: float) -> None:
        DirectionAdapter.__init__(self, base.weight())
        self.make_directions(base, r, scale)
        nn.init.zeros_(self.e)
        for factor in (self.a, self.b):
            if factor.numel():
                nn.init.normal_(factor, std=0.02)
        self.dropout = nn.Dropout(dropout)

    def change(self, x: Tensor) -> Tensor:
        """x times the delta, through the rank."""
        return self.product(self.dropout(x))
