"""Bit layouts of affine integer weights: how codes, scales and zero points lie in the tensors of a checkpoint.

A layout declares its tensors and converts to and from `AffineTensors`; nothing else in the package knows about bits.
Shape legend: d_in, d_out features; g groups along d_in; P codes in a 32-bit word.

The layouts are those of AutoGPTQ's and GPTQModel's `gptq` (zero points stored minus one) and `gptq_v2` (as they
are), and of AutoAWQ's GEMM kernels. compressed-tensors' `pack-quantized` is in `compressed_tensors.py`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_efficiency.quantization.layers.base import TensorSpec

BITS = (2, 3, 4, 8)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class AffineTensors:
    """An affine weight in plain form: w[o, i] = scales[o, g] * (codes[o, i] - zeros[o, g]) with g = g_idx[i].

    Attributes:
        codes: uint8 (d_out, d_in), values 0 .. 2^bits - 1.
        scales: float (d_out, g).
        zeros: uint8 or int32 (d_out, g).
        g_idx: int32 (d_in,), the group of each column.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor


def group_count(in_features: int, group_size: int) -> int:
    """Groups along d_in; a ragged last group counts. `group_size` -1 means one group."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def default_g_idx(in_features: int, group_size: int, device: torch.device | str | None = None) -> Tensor:
    """int32 (d_in,): column i belongs to group i // group_size."""
    index = torch.arange(in_features, dtype=torch.int32, device=device)
    return torch.zeros_like(index) if group_size == -1 else index // group_size


def pack_dense(codes: Tensor, bits: int) -> Tensor:
    """Packs codes (n, k) along their last axis into int32 words (n, ceil(k * bits / 32)), little end first.

    The codes of a row form one dense bit string, so 3-bit codes may straddle two words. Missing codes are zero.
    """
    n, k = codes.shape
    words = -(-k * bits // 32)
    if 32 % bits == 0:
        per_word = 32 // bits
        padded = codes.new_zeros((n, words * per_word), dtype=torch.int64)
        padded[:, :k] = codes
        shifts = torch.arange(per_word, device=codes.device) * bits
        return (padded.view(n, words, per_word) << shifts).sum(-1).to(torch.uint32).view(torch.int32)
    out = torch.zeros((n, words + 1), dtype=torch.int64, device=codes.device)
    first = torch.arange(k, device=codes.device) * bits
    word, shift = first // 32, first % 32
    wide = codes.to(torch.int64) << shift  # at most 31 + 8 bits: the upper part belongs to the next word
    out.index_add_(1, word, wide & 0xFFFFFFFF)
    out.index_add_(1, word + 1, wide >> 32)
    return out[:, :words].to(torch.uint32).view(torch.int32)


def unpack_dense(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_dense`: int32 words (n, w) to uint8 codes (n, count)."""
    mask = (1 << bits) - 1
    if 8 % bits == 0:  # no code straddles a byte: work on bytes, a quarter of the traffic
        octets = words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)  # rows of one word have any stride
        if bits < 8:
            shifted = [octets >> shift if shift else octets for shift in range(0, 8, bits)]
            octets = torch.stack(shifted, dim=-1).bitwise_and_(mask)
        return octets.view(words.shape[0], -1)[:, :count]
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    unsigned = torch.cat([unsigned, unsigned.new_zeros(unsigned.shape[0], 1)], dim=1)
    first = torch.arange(count, device=words.device) * bits
    word, shift = first // 32, first % 32
    low = unsigned[:, word] >> shift
    high = unsigned[:, word + 1] << (32 - shift)
    return ((low | high) & mask).to(torch.uint8)


class Layout(Protocol):
    """How an affine weight is stored. `bits` and `group_size` are the layer's."""

    def check(self, in_features: int, out_features: int, bits: int, group_size: int) -> None:
        """Raises ValueError where the layout can't hold a weight of these sizes."""

    def declare(self, in_features: int, out_features: int, bits: int, group_size: int) -> TensorSpec:
        """The stored tensors, the packed codes first."""

    def pack(self, tensors: AffineTensors, bits: int) -> dict[str, Tensor]:
        """Plain form to stored tensors."""

    def unpack(self, stored: dict[str, Tensor], bits: int, in_features: int, out_features: int) -> AffineTensors:
        """Stored tensors to plain form."""


@dataclass(frozen=True)
class GPTQLayout:
    """`qweight` packed along d_in, `qzeros` packed along d_out, `scales` fp16, `g_idx`.

    Attributes:
        zero_offset: What is subtracted from a zero point before it is stored: 1 in version 1, 0 in version 2.
    """

    zero_offset: int = 1

    def check(self, in_features: int, out_features: int, bits: int, group_size: int) -> None:
        """ValueError where d_in or d_out do not fill whole words."""
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size * bits % 32:
                step = 32 if bits == 3 else 32 // bits
                raise ValueError(
                    f"{name}={size} does not fill whole 32-bit words at {bits} bits, as the gptq format needs: it must "
                    f"be a multiple of {step}. Name the layer in `modules_to_not_convert` or choose other bits."
                )

    def declare(self, in_features: int, out_features: int, bits: int, group_size: int) -> TensorSpec:
        """The four tensors of a GPTQ layer."""
        groups = group_count(in_features, group_size)
        return {
            "qweight": ((in_features * bits // 32, out_features), torch.int32),
            "qzeros": ((groups, out_features * bits // 32), torch.int32),
            "scales": ((groups, out_features), torch.float16),
            "g_idx": ((in_features,), torch.int32),
        }

    def pack(self, tensors: AffineTensors, bits: int) -> dict[str, Tensor]:
        """Packs codes along d_in and zero points along d_out."""
        zeros = tensors.zeros.to(torch.int32)
        if bits == 3:
            zeros = (zeros - self.zero_offset) & 7
        return {
            "qweight": pack_dense(tensors.codes, bits).T.contiguous(),
            "qzeros": pack_dense(zeros.T.contiguous(), bits) - self._word_offset(bits),
            "scales": tensors.scales.T.contiguous().to(torch.float16),
            "g_idx": tensors.g_idx.to(torch.int32),
        }

    def unpack(self, stored: dict[str, Tensor], bits: int, in_features: int, out_features: int) -> AffineTensors:
        """Unpacks, with the version's zero offset added back."""
        codes = unpack_dense(stored["qweight"].T.contiguous(), bits, in_features)
        zeros = unpack_dense(stored["qzeros"] + self._word_offset(bits), bits, out_features).to(torch.int32)
        if bits == 3:
            zeros = (zeros + self.zero_offset) & 7
        return AffineTensors(codes, stored["scales"].T.contiguous(), zeros.T.contiguous(), stored["g_idx"])

    def _word_offset(self, bits: int) -> int:
        """What gptqmodel adds to a whole word of zero points; one of 0 then borrows from the next. Not at 3 bits."""
        return 0 if bits == 3 else self.zero_offset * sum(1 << shift for shift in range(0, 32, bits))


@dataclass(frozen=True)
class AWQLayout:
    """AutoAWQ's GEMM layout: 4 bits, `qweight` and `qzeros` packed along d_out with interleaved nibbles."""

    def check(self, in_features: int, out_features: int, bits: int, group_size: int) -> None:
        """ValueError unless 4 bits, d_out in eights and whole groups."""
        if bits != 4:
            raise ValueError(f"the awq format holds 4-bit codes only, got bits={bits}; use the gptq format for others.")
        if out_features % 8:
            raise ValueError(f"the awq format packs 8 outputs a word: out_features={out_features} is no multiple of 8.")
        if group_size != -1 and in_features % group_size:
            raise ValueError(
                f"the awq format has no ragged last group: in_features={in_features} is no multiple of "
                f"group_size={group_size}. Choose a group_size that divides it (64 or 32, say)."
            )

    def declare(self, in_features: int, out_features: int, bits: int, group_size: int) -> TensorSpec:
        """The three tensors of an AWQ GEMM layer."""
        groups = group_count(in_features, group_size)
        return {
            "qweight": ((in_features, out_features // 8), torch.int32),
            "qzeros": ((groups, out_features // 8), torch.int32),
            "scales": ((groups, out_features), torch.float16),
        }

    def pack(self, tensors: AffineTensors, bits: int) -> dict[str, Tensor]:
        """Packs along d_out; nibble i of a word holds output 8j + (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
        order = torch.tensor(_AWQ_ORDER, device=tensors.codes.device)

        def interleave(values: Tensor) -> Tensor:
            rows = values.T.contiguous()
            return pack_dense(rows.view(rows.shape[0], -1, 8)[:, :, order].reshape(rows.shape[0], -1), 4)

        scales = tensors.scales.T.contiguous().to(torch.float16)
        return {"qweight": interleave(tensors.codes), "qzeros": interleave(tensors.zeros), "scales": scales}

    def unpack(self, stored: dict[str, Tensor], bits: int, in_features: int, out_features: int) -> AffineTensors:
        """Undoes the nibble order and returns codes (d_out, d_in)."""
        inverse = torch.tensor(_AWQ_ORDER, device=stored["qweight"].device).argsort()

        def natural(words: Tensor) -> Tensor:
            flat = unpack_dense(words, 4, out_features)
            return flat.view(flat.shape[0], -1, 8)[:, :, inverse].reshape(flat.shape[0], -1).T.contiguous()

        groups = stored["scales"].shape[0]
        # The number of groups tells the group size: AWQ has no ragged group.
        g_idx = default_g_idx(in_features, in_features // groups, stored["qweight"].device)
        return AffineTensors(
            natural(stored["qweight"]),
            stored["scales"].T.contiguous(),
            natural(stored["qzeros"]).to(torch.int32),
            g_idx,
        )


LAYOUTS: dict[str, Layout] = {"gptq": GPTQLayout(1), "gptq_v2": GPTQLayout(0), "awq": AWQLayout()}
