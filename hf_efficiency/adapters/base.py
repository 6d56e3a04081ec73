"""What every adapter of a linear layer has.

Shapes: ... any leading dimensions, d_in, d_out features of the layer, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class BaseLinear:
    """The layer that an adapter sits on, dense or quantized.

    Attributes:
        weight: Gives the dense weight (d_out, d_in); of a quantized layer it is computed at each call.
        bias: (d_out,), or None.
        in_features, out_features: d_in and d_out.
    """

    weight: Callable[[], Tensor]
    bias: Tensor | None
    in_features: int
    out_features: int


class LinearAdapter(nn.Module):
    """The parameters that one adapter adds to one linear layer.

    A method implements `delta`; the rest follows where the adapted layer is again linear with weight W + delta. A
    method for which that is not so overrides `forward`, and either the two functions of merging or `mergeable`.
    """

    mergeable: ClassVar[bool] = True

    def delta(self) -> Tensor:
        """What merging adds to the weight, (d_out, d_in)."""
        raise NotImplementedError

    def forward(self, x: Tensor, output: Tensor, base: BaseLinear) -> Tensor:
        """What the adapter adds to the layer's output (..., d_out).

        Args:
            x: The layer's input (..., d_in), in the adapter's dtype.
            output: What the layer alone makes of it (..., d_out).
            base: The layer.
        """
        return nn.functional.linear(x, self.delta())

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The weight (d_out, d_in) of the adapted layer, in the dtype of `weight`, which stays as it is."""
        return weight + self.delta().to(weight.dtype)

    def unmerged_weight(self, weight: Tensor) -> Tensor:
        """The weight of the layer alone, from what `merged_weight` returned."""
        return weight - self.delta().to(weight.dtype)


class FrozenMatrix:
    """A random matrix that several layers share, that is never trained, and that only its seed is stored of.

    Args:
        shape: Of the matrix.
        seed: Of the generator, which always runs on the CPU, so that every device sees the same values.
        fill: Fills a float32 tensor in place from the generator.
    """

    def __init__(self, shape: tuple[int, ...], seed: int, fill: Callable[[Tensor, torch.Generator], object]) -> None:
        self.shape, self.seed, self.fill = shape, seed, fill
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def on(self, like: Tensor) -> Tensor:
        """The matrix on the device and in the dtype of `like`."""
        key = (like.device, like.dtype)
        if key not in self._copies:
            values = torch.empty(self.shape)
            self.fill(values, torch.Generator().manual_seed(self.seed))
            self._copies[key] = values.to(*key)
        return self._copies[key]
