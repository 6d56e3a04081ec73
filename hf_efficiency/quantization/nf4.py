"""NF4: 4-bit NormalFloat with blockwise scales and double quantization (QLoRA, https://arxiv.org/abs/2305.14314).

Codes and constants are those that bitsandbytes computes on a CPU, to the bit, so that its checkpoints and ours are the
same. Shape legend: d_out, d_in features; n elements of the flattened weight; m blocks.
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from hf_efficiency.calibration.method import BlockMethod
from hf_efficiency.quantization.layers.base import QuantizedLinear
from hf_efficiency.quantization.layers.lut import NESTED_BLOCK, LUTLinear, check_table

# Quantiles of the normal distribution: 8 of equal mass for the positive half, 7 for the negative, and an exact zero,
# scaled to [-1, 1]. Given as numbers, as everyone does, because quantile functions differ in the last bit.
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

_SMALLEST = 1e-38  # what bitsandbytes divides by in a block of zeros
_CHUNK = 1 << 22  # elements quantized at a time: bounds the float32 and index copies beside the weight
_GRID = 32767.5  # half the steps of the 65,536-entry table over [-1, 1] that bitsandbytes looks 8-bit codes up in


@cache
def nf4_table() -> Tensor:
    """The 16 NF4 values, float32, ascending."""
    return torch.tensor(NF4_TABLE)


@cache
def dynamic_map() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type, float32, ascending (https://arxiv.org/abs/1511.04561).

    Decade i of seven, 10^(i-6), holds 2^i values of each sign: the middles of equal parts of [0.1, 1]. 0 and 1 join.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values))


@cache
def _nearest_in_map() -> Tensor:
    """uint8 (65536,): the code of `dynamic_map()` nearest to each point of an even grid over [-1, 1]."""
    points = torch.arange(65536, dtype=torch.float64) / _GRID - 1
    table = dynamic_map()
    return torch.bucketize(points, ((table[:-1] + table[1:]) / 2).double()).to(torch.uint8)


def quantize_nf4(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Nearest NF4 codes of a weight, in blocks of its flattened elements.

    Args:
        weight: Floating tensor of n elements, any shape.
        block_size: Elements that share a scale. The last block may be smaller.

    Returns:
        uint8 (ceil(n / 2), 1), the even element of a pair in the high nibble, and the float32 scales (m,).
    """
    flat = weight.detach().reshape(-1)
    parts = [_quantize_chunk(chunk.float(), block_size) for chunk in flat.split(_CHUNK)]
    packed, absmax = zip(*parts, strict=True)
    return torch.cat(packed).unsqueeze(1), torch.cat(absmax)


def _quantize_chunk(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed bytes and scales of float32 x (n,); only the last chunk of a weight may end in a ragged block."""
    table = nf4_table().to(x.device)
    whole = x.numel() // block_size * block_size
    blocks = x[:whole].view(-1, block_size)
    absmax = blocks.abs().amax(dim=-1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST)).unsqueeze(-1)).view(-1)
    if whole < x.numel():
        # bitsandbytes divides here instead of multiplying, and stores the clamped scale: the bits depend on both.
        last = x[whole:].abs().amax().clamp(min=_SMALLEST)
        absmax = torch.cat([absmax, last.unsqueeze(0)])
        scaled = torch.cat([scaled, x[whole:] / last])
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)
    return (codes[::2] << 4) | codes[1::2], absmax


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit codes for the block scales.

    Args:
        absmax: float32 (m,).

    Returns:
        uint8 codes (m,), their float32 scales (ceil(m / 256),), and the float32 mean () taken off before.
    """
    offset = absmax.mean()
    centred = absmax - offset
    m = absmax.numel()
    padded = torch.nn.functional.pad(centred, (0, -m % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = padded.abs().amax(dim=-1)
    # A block of equal scales leaves 0 / 0, which bitsandbytes turns into code 0; its scale 0 makes any code right.
    scaled = (padded * (1.0 / nested).unsqueeze(-1)).nan_to_num(nan=-1.0).clamp(-1.0, 1.0)
    index = ((scaled + 1.0) * _GRID + 0.5).long()
    codes = _nearest_in_map().to(absmax.device)[index]
    return codes.view(-1)[:m], nested, offset


@dataclass(kw_only=True)
class NF4(BlockMethod):
    """Data-free 4-bit quantization in bitsandbytes' format.

    Attributes:
        block_size: Elements that share a scale: a power of two from 32 to 4096.
        double_quant: Store the scales in 8 bits: 4.127 bits a weight at block size 64 instead of 4.5.
        quant_type: `"nf4"`. `"fp4"` only describes a checkpoint that somebody else made.
        quant_storage: Name of the dtype as which the bytes are stored.
    """

    calibrated: ClassVar[bool] = False

    block_size: int = 64
    double_quant: bool = True
    quant_type: str = "nf4"
    quant_storage: str = "uint8"

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """ValueError for values out of range, naming value, bound and cure."""
        check_table(self.block_size, self.quant_type)
        if not isinstance(getattr(torch, self.quant_storage, None), torch.dtype):
            raise ValueError(f"quant_storage={self.quant_storage!r} is no torch dtype; use 'uint8'.")

    def empty_layer(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        conv1d: bool = False,
    ) -> LUTLinear:
        """A layer of these sizes whose tensors are not filled yet."""
        return LUTLinear(
            in_features,
            out_features,
            block_size=self.block_size,
            double_quant=self.double_quant,
            quant_type=self.quant_type,
            quant_storage=getattr(torch, self.quant_storage),
            bias=bias,
            compute_dtype=compute_dtype,
            device=device,
            conv1d=conv1d,
        )

    def quantize_weight(self, name: str, weight: Tensor, layer: QuantizedLinear) -> None:
        """Quantizes `weight` (d_out, d_in) and stores it in `layer`.

        Raises:
            ValueError: If the weight is not finite, or the table is not NF4.
        """
        if not isinstance(layer, LUTLinear):
            raise TypeError(f"{name}: NF4 stores into LUTLinear, got {type(layer).__name__}.")
        if self.quant_type != "nf4":
            raise ValueError(f"{name}: quant_type={self.quant_type!r} is only read from checkpoints; use 'nf4'.")
        packed, absmax = quantize_nf4(weight, self.block_size)
        if not bool(absmax.isfinite().all()):
            raise ValueError(f"{name}: the weight holds NaN or infinity; repair the checkpoint or leave the layer out.")
        tensors = {"weight": _as_storage(packed, layer.quant_storage), "quant_map": nf4_table(), "absmax": absmax}
        tensors["nested_offset"] = torch.zeros(())
        if self.double_quant:
            tensors["absmax"], tensors["nested_absmax"], tensors["nested_offset"] = double_quantize(absmax)
            tensors["nested_quant_map"] = dynamic_map()
        layer.store(tensors)


def _as_storage(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes (k, 1) seen as `dtype`, (ceil(k / itemsize), 1), padded with zeros."""
    flat = torch.nn.functional.pad(packed.view(-1), (0, -packed.numel() % dtype.itemsize))
    return flat.view(dtype).unsqueeze(1)
