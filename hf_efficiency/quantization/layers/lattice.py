"""The storage layer of QuIP#: lattice codes of a weight that is rotated on both sides.

`W = diag(SU) H_m^T (scale * C) H_n diag(SV)`, where C holds the decoded codewords, H the orthonormal Hadamard
transforms of `hadamard.py`, and SU, SV random signs or, after fine-tuning, real vectors (Tseng et al. 2024).

Shape legend: n rows of activations, d_in, d_out features, d_pad: d_in rounded up to a multiple of 8.
"""

from typing import Any

import torch
from torch import Tensor

from hf_efficiency.quantization.e8p import CODEBOOKS, DIM
from hf_efficiency.quantization.hadamard import dense_base, hadamard_transform, random_signs
from hf_efficiency.quantization.layers.base import BLOCK_ELEMENTS, QuantizedLinear, TensorSpec

_STAGES = ("codes", "residual_codes")
# Decoded weights that stay in a CPU's caches are multiplied five times faster (8192 x 2048, one row: 8.6 ms for 42).
_CPU_BLOCK_ELEMENTS = 1 << 20
# What the kernels read beside a layer's own tensors: bases by length (None: no dense one), and the decoding tables.
# Plain dictionaries, since torch.compile reads from one without breaking the graph.
_BASES: dict[tuple[int, torch.device], Tensor | None] = {}
_TABLES: dict[torch.device, tuple[Tensor, Tensor]] = {}


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
        self._multipliers: tuple[list[tuple[Tensor, int]], Tensor, Tensor] | None = None

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
        """Makes the signs of the seed and what the kernels need, which `torch.compile` can't."""
        self._signs = self._multipliers = None
        if self.codes.is_meta:
            return
        self.vectors()
        if self.codes.device.type in self.kernel_devices:
            self._kernel_vectors()
            _tables_on(self.codes.device)
            for length in (DIM * self.codes.shape[1], self.out_features):
                _base_on(length, self.codes.device)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._signs = self._multipliers = None

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

    def kernel_forward(self, x: Tensor) -> Tensor | None:
        """x Wᵀ plus the bias: a kernel for each rotation, with its vector, around one that decodes and multiplies.

        It rotates the activations however many they are: on an H100 that costs 4 (d_in + d_out) bytes a row, and the
        weight's own rotation in float32 some 80 d_in d_out, which pays from 10 d rows of a square layer on (41,000 for
        4096). From 257 rows on `e8p_linear` itself decodes the codewords once, for cuBLAS.
        """
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return None
        from hf_efficiency.kernels.e8p_linear import e8p_linear
        from hf_efficiency.kernels.hadamard import hadamard

        sv, su = self._kernel_vectors()
        patterns, roots = _tables_on(x.device)
        padded = DIM * self.codes.shape[1]
        base = _base_on(padded, x.device)
        if base is None:  # the Hartley transform has no kernel
            rotated = hadamard_transform(torch.nn.functional.pad(x * sv, (0, padded - x.shape[1]))).to(x.dtype)
        else:
            rotated = hadamard(x, _order_above_1(base), before=sv, length=padded)
        y = e8p_linear(
            rotated,
            *self.stages(),
            patterns=patterns,
            roots=roots if self.bits == 3 else None,
            residual_scale=CODEBOOKS[self.bits].residual_scale or 1.0,
        )
        base = _base_on(self.out_features, x.device)
        if base is None:
            y = (hadamard_transform(y.float(), transpose=True) * su).to(x.dtype)
        else:
            y = hadamard(y, _order_above_1(base), after=su, transpose=True)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _kernel_vectors(self) -> tuple[Tensor, Tensor]:
        """SV (d_in,), as int8 where it is signs, and SU times the scale (d_out,) float32: made once, and again when a
        tensor that they follow from is another or was written to.
        """
        sources = [self.scale, self.su, self.sv] if self.tuned else [self.scale, self.seed]
        known = self._multipliers
        if known is None or not all(map(_unchanged, sources, known[0])):
            known = self._make_multipliers(sources)
        return known[1], known[2]

    def _make_multipliers(self, sources: list[Tensor]) -> tuple[list[tuple[Tensor, int]], Tensor, Tensor]:
        with torch.inference_mode(False), torch.no_grad():  # autograd may save what is made here
            su, sv = self.vectors()
            sv = sv.clone() if self.tuned else sv.to(torch.int8)
            made = ([(t, _version(t)) for t in sources], sv, su * self.scale)
        self._multipliers = made
        return made

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


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to, 0 for an inference tensor, which doesn't count."""
    return 0 if tensor.is_inference() else tensor._version


def _unchanged(tensor: Tensor, known: tuple[Tensor, int]) -> bool:
    return tensor is known[0] and (torch.compiler.is_compiling() or _version(tensor) == known[1])


def _order_above_1(base: Tensor) -> Tensor | None:
    """The base as the kernel takes it, None where the length is a power of two."""
    return base if len(base) > 1 else None


def _base_on(length: int, device: torch.device) -> Tensor | None:
    key = (length, device)
    if key not in _BASES:
        # The cache outlives the caller's modes: no inference tensor, no default device may end up in it.
        with torch.inference_mode(False), torch.device("cpu"):
            base = dense_base(length)
            _BASES[key] = None if base is None else base.to(device)
    return _BASES[key]


def _tables_on(device: torch.device) -> tuple[Tensor, Tensor]:
    if device not in _TABLES:
        from hf_efficiency.kernels.e8p_linear import e8p_tables

        with torch.inference_mode(False):
            _TABLES[device] = e8p_tables(device)
    return _TABLES[device]
