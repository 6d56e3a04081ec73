"""Affine integer groups: w = s (q - z), stored in one of the layouts of `formats.py`.

Shape legend: n rows, d_in, d_out features, g groups, k columns of a CPU kernel's group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_efficiency.quantization.formats import (
    BITS,
    LAYOUTS,
    AffineTensors,
    AWQLayout,
    GPTQLayout,
    Layout,
    default_g_idx,
    group_count,
)
from hf_efficiency.quantization.layers.base import QuantizedLinear, TensorSpec

# torch's packed int4 product wins over decoding the whole layer up to about this many rows (measured, 2 Zen 4 cores:
# 0.2 ms a row against 25 ms to decode 8192 x 2048).
_INT4_ROWS = 128
_INT4_GROUPS = (256, 128, 64, 32)
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class _Int4Kernel:
    """A weight repacked for `aten::_weight_int4pack_mm_for_cpu`."""

    packed: Tensor
    scales_and_zeros: Tensor  # (padded d_in / k, d_out, 2) bfloat16
    group: int
    padding: int
    order: Tensor | None  # columns sorted by group, where the checkpoint's groups are permuted

    def __call__(self, x: Tensor) -> Tensor:
        if self.order is not None:
            x = x[:, self.order]
        if self.padding:
            x = torch.nn.functional.pad(x, (0, self.padding))
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group, self.scales_and_zeros)


class AffineLinear(QuantizedLinear):
    """Storage layer of RTN, GPTQ, AWQ and every other method that ends in integer codes with scales and zero points.

    Args:
        in_features: d_in.
        out_features: d_out.
        bits: 2, 3, 4 or 8.
        group_size: Columns that share a scale; -1 for one group a row. The last group may be smaller.
        layout: A key of `formats.LAYOUTS`, or a layout.
        bias: Whether the layer has a bias.
        compute_dtype: dtype of `dequantize()`.
        device: Device of the tensors.
        conv1d: See `QuantizedLinear`.

    Raises:
        ValueError: If the layout can't hold a weight of these sizes.
    """

    scales: Tensor
    g_idx: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        layout: str | Layout = "gptq",
        bias: bool = False,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        conv1d: bool = False,
    ) -> None:
        self.bits = bits
        self.group_size = group_size
        self.layout = layout
        self._layout: Layout = LAYOUTS[layout] if isinstance(layout, str) else layout
        self._layout.check(in_features, out_features, bits, group_size)
        self.in_features, self.out_features = in_features, out_features
        super().__init__(
            in_features, out_features, bias=bias, compute_dtype=compute_dtype, device=device, conv1d=conv1d
        )
        self._int4: _Int4Kernel | None = None
        self._regular: bool | None = None
        self._permuted: bool | None = None
        self._prepared = False

    def declare(self) -> TensorSpec:
        """The tensors of the layout."""
        return self._layout.declare(self.in_features, self.out_features, self.bits, self.group_size)

    def pack(self, tensors: AffineTensors) -> None:
        """Stores codes (d_out, d_in), scales and zeros (d_out, g) and g_idx (d_in,)."""
        for name, value in self._layout.pack(tensors, self.bits).items():
            getattr(self, name).copy_(value)
        self._renew()

    def unpack(self) -> AffineTensors:
        """The stored codes, scales, zero points and group indices."""
        stored = {name: getattr(self, name) for name in self.declare()}
        return self._layout.unpack(stored, self.bits, self.in_features, self.out_features)

    def dequantize(self) -> Tensor:
        """s (q - z) in float32, rounded once to `compute_dtype`; (d_out, d_in)."""
        plain = self.unpack()
        scales, zeros = plain.scales.float(), plain.zeros.float()
        if self._is_regular(plain.g_idx):
            shape = (self.out_features, scales.shape[1], -1)
            weight = (plain.codes.view(shape).float() - zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1))
            return weight.view(self.out_features, self.in_features).to(self.compute_dtype)
        index = plain.g_idx.long()
        return (plain.codes.float() - zeros[:, index]).mul_(scales[:, index]).to(self.compute_dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ: torch's packed int4 kernel for few rows in bfloat16 on a CPU, else the blocked decode."""
        if self._int4 is not None and x.dtype == torch.bfloat16 and x.shape[0] <= _INT4_ROWS and not x.is_cuda:
            return self._int4(x)
        return super().matmul(x)

    def kernel_forward(self, x: Tensor) -> Tensor | None:
        """x Wᵀ plus the bias, straight from the stored tensors of the gptq, gptq_v2 and awq layouts."""
        layout = self._layout
        if not isinstance(layout, GPTQLayout | AWQLayout) or x.dtype not in _KERNEL_DTYPES:
            return None
        from hf_efficiency.kernels.quant_linear import awq_linear, gptq_linear

        qweight, qzeros, scales = (self.get_buffer(name) for name in ("qweight", "qzeros", "scales"))
        if isinstance(layout, AWQLayout):
            return awq_linear(x, qweight, qzeros, scales, self.bias, group_size=self.group_size)
        if self._permuted is None:  # not prepared: the comparison waits for the device, once
            self._permuted = self.permuted()
        return gptq_linear(
            x,
            qweight,
            qzeros,
            scales,
            self.g_idx if self._permuted else None,
            self.bias,
            bits=self.bits,
            group_size=self.group_size,
            zero_offset=layout.zero_offset,
        )

    def prepare(self) -> None:
        """Repacks the codes for the CPU's int4 product (2- and 3-bit codes ride in 4). Costs half a byte a weight."""
        self._forget()
        self._prepared = True
        device = self.W_q.device.type
        if device == "meta":
            return
        self._permuted = self.permuted()
        plain = self.unpack()
        self._is_regular(plain.g_idx)
        if self.compute_dtype == torch.bfloat16 and device == "cpu" and self.bits <= 4:
            self._int4 = _int4_kernel(plain, self.group_size)

    def permuted(self) -> bool:
        """Whether columns were put into groups out of order, as `g_idx` says."""
        index = self._buffers.get("g_idx")
        if index is None or index.is_meta:
            return False
        return not torch.equal(index, default_g_idx(self.in_features, self.group_size, index.device))

    def _is_regular(self, g_idx: Tensor) -> bool:
        """Whether column i lies in group i // group_size and all groups are full: then reshaping replaces gathers."""
        if self._regular is None:
            full = self.group_size == -1 or self.in_features % self.group_size == 0
            expected = default_g_idx(self.in_features, self.group_size, g_idx.device)
            self._regular = full and g_idx.device.type != "meta" and torch.equal(g_idx, expected)
        return self._regular

    def _forget(self) -> None:
        self._int4, self._regular, self._permuted = None, None, None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AffineLinear":
        super()._apply(fn, recurse)
        self._renew()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._renew()

    def _renew(self) -> None:
        """Drops what was derived from tensors that have changed, and derives it again where it was in use."""
        if self._prepared:
            self.prepare()
        else:
            self._forget()

    def extra_repr(self) -> str:
        """Sizes and format."""
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}, layout={self.layout!r}"


def check_bits(bits: int) -> None:
    """ValueError unless an affine layer can hold codes of this width."""
    if bits not in BITS:
        raise ValueError(f"bits={bits!r} is not supported: choose one of {', '.join(map(str, BITS))}.")


def _int4_kernel(plain: AffineTensors, group_size: int) -> _Int4Kernel | None:
    """The CPU kernel's form of a weight of at most 4 bits, or None where the kernel does not take its shape."""
    out_features, in_features = plain.codes.shape
    size = in_features if group_size == -1 else group_size
    if out_features % 16:
        return None
    # One group a row may be cut at will: the ragged rest is padded. Other groups must be cut into equal parts.
    kernel_group = _INT4_GROUPS[0] if group_size == -1 else next((k for k in _INT4_GROUPS if size % k == 0), None)
    if kernel_group is None:
        return None
    order = None
    index = plain.g_idx.long()
    codes = plain.codes
    if not torch.equal(plain.g_idx, default_g_idx(in_features, group_size)):
        order = index.argsort(stable=True)
        sizes = torch.bincount(index, minlength=group_count(in_features, group_size))
        if (sizes[:-1] != size).any():
            return None
        codes = codes[:, order]
    padding = -in_features % kernel_group
    group_of = torch.arange(in_features) // size
    zeros = plain.zeros.int()
    # The kernel computes (q - 8) s + b with b in bfloat16. Codes that can be moved so that zero is 8 need no b.
    centred = codes.int() + (8 - zeros)[:, group_of]
    if centred.min() >= 0 and centred.max() <= 15:
        codes, zeros = centred, torch.full_like(zeros, 8)
    padded = torch.nn.functional.pad(codes, (0, padding)).to(torch.int32)
    source = (torch.arange(padded.shape[1] // kernel_group) * kernel_group) // size
    scales = plain.scales.float()[:, source]
    offsets = scales * (8 - zeros[:, source])
    table = torch.stack([scales.T, offsets.T], dim=-1).to(torch.bfloat16).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(padded, 1)
    return _Int4Kernel(packed, table, kernel_group, padding, order)
