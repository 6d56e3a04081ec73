"""Training in a random subspace: all weights move together along d directions (Li et al. 2018).

Shapes: d_in, d_out features of a layer, D = d_in d_out, d dimension of the subspace, n the power of two from d on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_efficiency.adapters.dense import DenseDeltaAdapter
from hf_efficiency.adapters.shared import SharedParameter
from hf_efficiency.quantization.hadamard import hadamard_transform, random_signs

if TYPE_CHECKING:
    from hf_efficiency.adapters.base import BaseLinear


class Subspace:
    """The d trained numbers, and the part of the projection that all layers share.

    Args:
        d: Dimension.
        seed: Of the projection, of which nothing else is stored.
    """

    def __init__(self, d: int, seed: int) -> None:
        self.seed, self.n = seed, 1 << (d - 1).bit_length()
        self.theta = SharedParameter("theta", torch.zeros(d))
        self._signs = random_signs(seed, "intrinsic", self.n)
        self._order = torch.randperm(self.n, generator=torch.Generator().manual_seed(seed))

    def mixed(self, like: Tensor) -> Tensor:
        """Permutation, Hadamard transform and random signs of the numbers, (n,): all of length 1 stay of length 1."""
        theta = self.theta.on(like)
        padded = nn.functional.pad(theta, (0, self.n - len(theta)))
        return hadamard_transform(padded * self._signs.to(padded))[self._order.to(like.device)]


class Intrinsic(DenseDeltaAdapter):
    """delta = P theta with the same theta for all layers (Aghajanyan et al. 2021, section 3).

    P is a structured random matrix as in Fastfood (Le et al. 2013): blocks H S_k Pi H B, one after the other until
    there are D rows, with the Hadamard transform H, signs B and permutation Pi that all layers share, and signs S_k
    drawn for each block of each layer. Signs take the place of Fastfood's Gaussians, as in orthogonal random features:
    every block keeps lengths, and P has columns of length 1 (Li et al. 2018, section 2).

    Args:
        base: The layer.
        name: Of the layer, from which its signs are drawn.
        subspace: What all layers share.
        said: Whether the layer trains a factor of its own (structure-aware, equation 3).
    """

    def __init__(self, base: BaseLinear, name: str, subspace: Subspace, said: bool) -> None:
        super().__init__()
        self.shape = (base.out_features, base.in_features)
        self._subspace = subspace
        self.rows = self.shape[0] * self.shape[1]
        blocks = -(-self.rows // subspace.n)
        self.register_buffer("_signs", _pack(subspace.seed, name, blocks * subspace.n), persistent=False)
        if said:
            self.scale = nn.Parameter(torch.ones(()))
        subspace.theta.join(self)

    def dense_delta(self, known: dict[str, float]) -> Tensor:
        """The delta (d_out, d_in)."""
        packed: Tensor = self._signs  # type: ignore[assignment]
        mixed = self._subspace.mixed(packed)
        n = len(mixed)
        projected = hadamard_transform(_unpack(packed, mixed.dtype).view(-1, n) * mixed).flatten()[: self.rows]
        delta = (n / self.rows) ** 0.5 * projected.view(self.shape)
        return delta * self.scale if hasattr(self, "scale") else delta


def _pack(seed: int, stream: str, length: int) -> Tensor:
    """Random signs, one bit each."""
    bits = random_signs(seed, f"intrinsic/{stream}", length) > 0
    padded = nn.functional.pad(bits, (0, -length % 8)).view(-1, 8)
    return (padded * (1 << torch.arange(8))).sum(dim=1).to(torch.uint8)


def _unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten().to(dtype) * 2 - 1
