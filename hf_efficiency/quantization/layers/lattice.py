"""The storage layer of QuIP#: lattice codes of a weight that is rotated on both sides.

`W = diag(SU) H_m^T (scale * C) H_n diag(SV)`, where C holds the decoded codewords, H the orthonormal Hadamard
transforms of `hadamard.py`, and SU, SV random signs or, after fine-tuning, real vectors (Tseng et al. 2024).

Shape legend: n rows of activations, d_in, d_out features, d_pad: d_in rounded up to a multiple of 8.
"""

from typing import Any

import torch
from torch import Tensor

from hf_efficiency.quantization.e8p import CODEBOOKS, DIM
from hf_efficiency.quantization.hadamard import hadamard_transform, random_signs
from hf_efficiency.quantization.layers.base import BLOCK_ELEMENTS, QuantizedLinear, TensorSpec

_STAGES = ("codes", "residual_codes")
# Decoded weights that stay in a CPU's caches are multiplied five times faster (8192 x 2048, one row: 8.6 ms for 42).
_CPU_BLOCK_ELEMENTS = 1 << 20


class LatticeLinear(QuantizedLinear):
    """Codes of 8 weights each, one scale, and either the seed of the signs or two fine-tuned vectors.

    Args:
        in_features: d_in. Where it is no multiple of 8, the weight is padded by zero columns before it is rotated.
        out_features: d_out.
        bits: 2, 3 or 4 bits per weight.
        tuned: Whether SU (d_out,) and SV (d_in,) are stored as float16 vectors in the place of the seed.
        bias: Whether the layer has a bias.
        compute_dtype: dtype of `dequantize()`.
        device: Device of the tensors.
        conv1d: See `QuantizedLinear`.

    Raises:
        ValueError: If `bits` is none of 2, 3 and 4.
    """

    codes: Tensor  # (d_out, d_pad / 8) int16
    scale: Tensor  # () float32
    seed: Tensor  # () int64, or else:
    su: Tensor  # (d_out,) float16
    sv: Tensor  # (d_in,) float16

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        tuned: bool = False,
        bias: bool = False,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        conv1d: bool = False,
    ) -> None:
        if bits not in CODEBOOKS:
            raise ValueError(f"bits={bits!r} has no lattice codebook: choose one of {', '.join(map(str, CODEBOOKS))}.")
        self.bits = bits
        self.tuned = tuned
        self.in_features, self.out_features = in_features, out_features
        super().__init__(
            in_features, out_features, bias=bias, compute_dtype=compute_dtype, device=device, conv1d=conv1d
        )
        self._signs: tuple[Tensor, Tensor, Tensor] | None = None

    def declare(self) -> TensorSpec:
        """Codes of each stage, the scale, and the seed or the two vectors."""
        width = -(-self.in_features // DIM)
        spec: TensorSpec = {
            name: ((self.out_features, width), dtype)
            for name, dtype in zip(_STAGES, CODEBOOKS[self.bits].code_dtypes, strict=False)
        }
        spec["scale"] = ((), torch.float32)
        if self.tuned:
            return spec | {"su": ((self.out_features,), torch.float16), "sv": ((self.in_features,), torch.float16)}
        return spec | {"seed": ((), torch.int64)}

    def stages(self) -> list[Tensor]:
        """Codes (d_out, d_pad / 8) of each stage."""
        return [getattr(self, name) for name in _STAGES if name in self._buffers]

    def vectors(self) -> tuple[Tensor, Tensor]:
        """SU (d_out,) and SV (d_in,) in float32."""
        if self.tuned:
            return self.su.float(), self.sv.float()
        known = self._signs
        if known is None or known[0] is not self.seed:  # loaders may put another tensor in its place
            known = self._make_signs()
        return known[1], known[2]

    def _make_signs(self) -> tuple[Tensor, Tensor, Tensor]:
        su, sv = signs(int(self.seed.item()), self.in_features, self.out_features)
        self._signs = (self.seed, su.to(self.seed.device), sv.to(self.seed.device))
        return self._signs

    def prepare(self) -> None:
        """Makes the signs of the seed, which `torch.compile` can't."""
        self._signs = None
        if not self.codes.is_meta:
            self.vectors()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._signs = None

    def unsigned(self) -> Tensor:
        """The weight without its two vectors, `scale H_m^T C H_n`: (d_out, d_in) float32."""
        rotated = CODEBOOKS[self.bits].decode(self.stages())  # (d_out, d_pad)
        left = hadamard_transform(rotated, transpose=True)[:, : self.in_features]
        return hadamard_transform(left, transpose=True, dim=0) * self.scale

    def dequantize(self) -> Tensor:
        """The weight in the basis of its inputs and outputs, computed in float32: (d_out, d_in)."""
        su, sv = self.vectors()
        return self.unsigned().mul_(su[:, None]).mul_(sv).to(self.compute_dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ. Rotates the activations when they are fewer rows than the weight has, else the weight."""
        if x.shape[0] > max(self.in_features, self.out_features):
            return x @ self.dequantize().to(x.dtype).T
        su, sv = self.vectors()
        scaled = torch.nn.functional.pad(x * sv, (0, -self.in_features % DIM))
        rotated = hadamard_transform(scaled).to(x.dtype)  # (n, d_pad)
        y = self._decoded_matmul(rotated)
        return (hadamard_transform(y.float(), transpose=True) * (su * self.scale)).to(x.dtype)

    def _decoded_matmul(self, rotated: Tensor) -> Tensor:
        """(n, d_pad) times the transposed codewords, a block of rows of the weight at a time: (n, d_out)."""
        codebook, stages = CODEBOOKS[self.bits], self.stages()
        elements = _CPU_BLOCK_ELEMENTS if rotated.device.type == "cpu" else BLOCK_ELEMENTS
        rows = max(1, elements // self.in_features)
        blocks = [
            rotated @ codebook.decode([c[start : start + rows] for c in stages], rotated.dtype).T
            for start in range(0, self.out_features, rows)
        ]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)

    def extra_repr(self) -> str:
        """Sizes and format."""
        return f"{super().extra_repr()}, bits={self.bits}, tuned={self.tuned}"


def signs(seed: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """The random signs SU (d_out,) and SV (d_in,) of a seed, float32."""
    return random_signs(seed, "SU", out_features), random_signs(seed, "SV", in_features)
