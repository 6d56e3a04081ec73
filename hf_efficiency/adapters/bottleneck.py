"""Bottleneck adapters: a small feed-forward after (Houlsby et al. 2019) or beside (He et al. 2022) a sub-layer.

Shapes: ... any leading dimensions, d width of the hidden states, m width of the bottleneck.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_efficiency.adapters.base import LinearAdapter

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_efficiency.adapters.base import BaseLinear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


class SequentialAdapter(LinearAdapter):
    """h + up(f(down(h))) on what a layer puts out (Houlsby et al. 2019, section 2.1). It cannot be merged.

    A subclass gives `down` and `up`.

    Args:
        non_linearity: A key of `ACTIVATIONS`.
        dropout: Probability of dropping a number of the bottleneck.
    """

    mergeable = False

    def __init__(self, non_linearity: str, dropout: float) -> None:
        super().__init__()
        self.activation, self.dropout = ACTIVATIONS[non_linearity], nn.Dropout(dropout)

    def down(self, hidden: Tensor) -> Tensor:
        """(..., d) to (..., m)."""
        raise NotImplementedError

    def up(self, hidden: Tensor) -> Tensor:
        """(..., m) to (..., d)."""
        raise NotImplementedError

    def forward(self, x: Tensor, output: Tensor, base: BaseLinear) -> Tensor:
        """What the adapter adds to the layer's output (..., d)."""
        return self.change(output)

    def change(self, hidden: Tensor) -> Tensor:
        """up(f(down(h))) of the hidden states (..., d) that the adapter reads."""
        return self.up(self.dropout(self.activation(self.down(hidden))))


class Bottleneck(SequentialAdapter):
    """Dense projections with biases: 2 m d + d + m trained numbers, one more where the scale is learned.

    The up projection starts at zero, so that the layer starts as it was.

    Args:
        d: Width of the hidden states.
        m: Width of the bottleneck.
        non_linearity, dropout: As in `SequentialAdapter`.
        scale: Factor of the change.
        learn_scale: Whether the factor is trained.
    """

    def __init__(self, d: int, m: int, non_linearity: str, dropout: float, scale: float, learn_scale: bool) -> None:
        super().__init__(non_linearity, dropout)
        self.down_weight = nn.Parameter(torch.empty(m, d))
        self.down_bias = nn.Parameter(torch.zeros(m))
        self.up_weight = nn.Parameter(torch.zeros(d, m))
        self.up_bias = nn.Parameter(torch.zeros(d))
        nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))
        self.scale: Tensor | float = nn.Parameter(torch.tensor(scale)) if learn_scale else scale

    def down(self, hidden: Tensor) -> Tensor:
        """(..., d) to (..., m)."""
        return nn.functional.linear(hidden, self.down_weight, self.down_bias)

    def up(self, hidden: Tensor) -> Tensor:
        """(..., m) to (..., d)."""
        return nn.functional.linear(hidden, self.up_weight, self.up_bias) * self.scale


class SublayerInput(LinearAdapter):
    """Sits on the layer that reads a sub-layer's input, changes nothing, and keeps the input for a parallel adapter."""

    mergeable = False

    def __init__(self) -> None:
        super().__init__()
        self._kept: Tensor | None = None

    def forward(self, x: Tensor, output: Tensor, base: BaseLinear) -> Tensor:
        """Zero."""
        self._kept = x
        return output.new_zeros(())

    def take(self) -> Tensor:
        """The input (..., d) of the sub-layer that runs, once.

        Raises:
            RuntimeError: The sub-layer reached its output projection without running the layer that this sits on.
        """
        kept, self._kept = self._kept, None
        if kept is None:
            raise RuntimeError("a parallel adapter ran before the first linear layer of its sub-layer.")
        return kept


class ParallelBottleneck(Bottleneck):
    """sublayer(h) + s up(f(down(h))), on the sub-layer's output projection (He et al. 2022, section 3.3 and table 1).

    Args:
        source: Sits on the first linear layer of the same sub-layer and keeps h.
        d, m, non_linearity, dropout, scale, learn_scale: As in `Bottleneck`.
    """

    def __init__(
        self,
        source: SublayerInput,
        d: int,
        m: int,
        non_linearity: str,
        dropout: float,
        scale: float,
        learn_scale: bool,
    ) -> None:
        super().__init__(d, m, non_linearity, dropout, scale, learn_scale)
        self._source = (source,)  # in a tuple, so that it belongs to its own layer alone

    @property
    def source(self) -> SublayerInput:
        """What keeps the sub-layer's input."""
        return self._source[0]

    def forward(self, x: Tensor, output: Tensor, base: BaseLinear) -> Tensor:
        """What the adapter adds to the output of the sub-layer (..., d)."""
        return self.change(self.source.take().to(output.dtype))
