"""Plain torch: the truth in tests, and what runs without a kernel.

Shape legend: n rows, d_in, d_out features; m blocks. The weight is `table[code] * scale`, in float32 throughout.
"""

import torch
from torch import Tensor

NESTED_BLOCK = 256


def dense(
    packed: Tensor,
    table: Tensor,
    absmax: Tensor | None,
    nested_map: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
) -> Tensor:
    """The weight (d_out, d_in), float32. Two codes a byte, the first in the high nibble, of the flattened weight.

    `table` is (16,), with scales of blocks of `block_size` elements in `absmax`, or (d_out, 16), without.
    """
    octets = packed.reshape(-1).int()
    codes = torch.stack([octets >> 4, octets & 15], dim=-1).view(-1)[: out_features * in_features]
    if absmax is None:
        return table.float().gather(1, codes.view(out_features, in_features).long())
    scales = absmax
    if nested_map is not None and nested_absmax is not None and nested_offset is not None:
        block = torch.arange(absmax.numel(), device=absmax.device) // NESTED_BLOCK
        scales = nested_map[absmax.int()] * nested_absmax[block] + nested_offset
    scales = scales.repeat_interleave(block_size)[: codes.numel()]
    return (table[codes] * scales).view(out_features, in_features)


def linear(
    x: Tensor,
    packed: Tensor,
    table: Tensor,
    absmax: Tensor | None,
    nested_map: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    block_size: int,
) -> Tensor:
    """x Wᵀ + bias in float32, rounded once to the dtype of x. x (n, d_in), bias (d_out,)."""
    weight = dense(
        packed, table, absmax, nested_map, nested_absmax, nested_offset, out_features, x.shape[1], block_size
    )
    y = x.float() @ weight.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linear_backward(
    grad: Tensor,
    packed: Tensor,
    table: Tensor,
    absmax: Tensor | None,
    nested_map: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    block_size: int,
) -> Tensor:
    """Gradient of `linear` with respect to x, (n, d_in), for grad (n, d_out)."""
    weight = dense(
        packed, table, absmax, nested_map, nested_absmax, nested_offset, grad.shape[1], in_features, block_size
    )
    return (grad.float() @ weight).to(grad.dtype)
