"""VeRA in DoRA's direction: vectors that scale two frozen random matrices, and a magnitude.

Shapes: d_in, d_out features of the layer, r rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_efficiency.adapters.base import FrozenMatrix
from hf_efficiency.adapters.dora import DirectionAdapter

if TYPE_CHECKING:
    from hf_efficiency.adapters.base import BaseLinear


def projections(r: int, d_in: int, d_out: int, seed: int) -> tuple[FrozenMatrix, FrozenMatrix]:
    """The matrices A (r, d_in) and B (d_out, r) that all layers share (VeRA, Kopiczko et al. 2024, section 3.1).

    Smaller layers use their first columns of A and rows of B.
    """
    return FrozenMatrix((r, d_in), seed, _kaiming), FrozenMatrix((d_out, r), seed + 1, _kaiming)


class DVoRA(DirectionAdapter):
    """delta = diag(b) B diag(d) A in the direction of DoRA (Liu et al. 2024, section 5.5 and table 5).

    Trains r + 2 d_out numbers a layer: d, b and the magnitude.

    Args:
        base: The layer.
        shared: A and B, at least as wide as the layer.
        r: Rank.
        d_initial: Where d starts; b starts at zero, so that the layer starts as it was.
        dropout: Probability of dropping an input of the change.
    """

    def __init__(
        self, base: BaseLinear, shared: tuple[FrozenMatrix, FrozenMatrix], r: int, d_initial: float, dropout: float
    ) -> None:
        super().__init__(base.weight())
        self.shared, self.d_in, self.d_out = shared, base.in_features, base.out_features
        self.d = nn.Parameter(torch.full((r,), d_initial))
        self.b = nn.Parameter(torch.zeros(base.out_features))
        self.dropout = nn.Dropout(dropout)

    def delta(self) -> Tensor:
        """diag(b) B diag(d) A, (d_out, d_in)."""
        a, b = self._matrices()
        return (self.b[:, None] * b) @ (self.d[:, None] * a)

    def change(self, x: Tensor) -> Tensor:
        """x times the delta, through the rank."""
        a, b = self._matrices()
        return nn.functional.linear(nn.functional.linear(self.dropout(x), a) * self.d, b) * self.b

    def _matrices(self) -> tuple[Tensor, Tensor]:
        a, b = (matrix.on(self.d) for matrix in self.shared)
        return a[:, : self.d_in], b[: self.d_out]


def _kaiming(values: Tensor, generator: torch.Generator) -> None:
    """Uniform with variance 2 / fan-in: what VeRA's section 3.3 says of both matrices."""
    bound = math.sqrt(6 / values.shape[1])
    values.uniform_(-bound, bound, generator=generator)
