"""Plain torch: the truth in tests, and what runs without a kernel.

Code layout: bits 8-15 the row of `patterns`, bit 7 set for the shift -1/4, bits 0-6 set where coordinates 0-6 are
negative before the shift; the sign of coordinate 7 follows from the parity.

Shape legend: r rows, d_in inputs, d_out outputs, c = d_in / 8 codes a row.
"""

import torch
from torch import Tensor

# Decoded weights that are held at once.
BLOCK_ELEMENTS = 1 << 24


def e8p_decode(
    codes: Tensor,
    residual: Tensor | None,
    patterns: Tensor,
    roots: Tensor | None,
    residual_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Codewords (d_out, d_in) of codes (d_out, c), summed in float32 and rounded once."""
    value = _points(codes, patterns)
    if residual is not None:
        second = _points(residual, patterns) if roots is None else _roots(residual, roots)
        value += second * (1 / residual_scale)
    return value.flatten(1).to(dtype)


def _points(codes: Tensor, patterns: Tensor) -> Tensor:
    """E8P: (d_out, c, 8) float32."""
    code = codes.int() & 0xFFFF
    entry = patterns[code >> 8]
    bit = torch.arange(8, dtype=torch.int32, device=codes.device)
    size = (entry[..., None] >> 4 * bit & 7) / 2
    negative = code[..., None] >> bit[:7] & 1
    last = negative.sum(-1, keepdim=True) + (entry[..., None] >> 31) & 1
    sign = 1 - 2 * torch.cat([negative, last], -1)
    return size * sign + (1 - 2 * (code >> 7 & 1))[..., None] / 4


def _roots(codes: Tensor, roots: Tensor) -> Tensor:
    """The 1-bit E8 codebook: (d_out, c, 8) float32."""
    bit = torch.arange(8, dtype=torch.int32, device=codes.device)
    return ((roots[codes.int()][..., None] >> 4 * bit & 15) - 8) / 2


def e8p_linear(
    x: Tensor,
    codes: Tensor,
    residual: Tensor | None,
    patterns: Tensor,
    roots: Tensor | None,
    residual_scale: float,
) -> Tensor:
    """x Cᵀ, x (r, d_in) to (r, d_out), a block of rows of C at a time."""
    rows = max(1, BLOCK_ELEMENTS // x.shape[1])
    made = []
    for start in range(0, max(1, len(codes)), rows):
        stages = [None if c is None else c[start : start + rows] for c in (codes, residual)]
        made.append(x @ e8p_decode(codes[start : start + rows], stages[1], patterns, roots, residual_scale, x.dtype).T)
    return made[0] if len(made) == 1 else torch.cat(made, 1)


def e8p_linear_backward(
    grad: Tensor,
    codes: Tensor,
    residual: Tensor | None,
    patterns: Tensor,
    roots: Tensor | None,
    residual_scale: float,
) -> Tensor:
    """grad C, grad (r, d_out) to (r, d_in), a block of columns of C at a time."""
    columns = max(1, BLOCK_ELEMENTS // 8 // max(1, len(codes)))
    made = []
    for start in range(0, codes.shape[1], columns):
        part = slice(start, start + columns)
        second = None if residual is None else residual[:, part]
        made.append(grad @ e8p_decode(codes[:, part], second, patterns, roots, residual_scale, grad.dtype))
    return made[0] if len(made) == 1 else torch.cat(made, 1)
