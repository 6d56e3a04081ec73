"""The Triton code. Imported on the first launch only.

Codes become digits in registers, 8 at a time in one 32-bit word: a table of 1 KB, which stays in L1, gives twice the
absolute values (1, 3 or 5). Seven sign bits are dealt to the lowest bits of the digits, the eighth is their parity, and
`(word ^ mask) - mask + offset` then negates the marked digits and adds 6, or 5 for the shift -1/4, without a carry from
one digit to another. What comes out is `2 v + 5.5`, from 0 to 11. A digit turns into a float as low bits of the
mantissa under an exponent that makes their unit 1, and one subtraction. That is 5 instructions a weight and stage.

One row: those instructions are the bound (3 us at 4096 x 4096 on an H100, where memory needs 1.5 us for 2 bits and
cuBLAS 11 us in bfloat16); a program takes a few outputs and all of K, cut among its lanes and warps, so that there is
nothing to sum up afterwards. Up to 256 rows: tensor cores take the products, K is cut among programs until all
multiprocessors have work, and the float32 parts are summed in a fixed order by a second launch. Above, decoding the
weight again for every 64 rows costs more than to write it once (11 us) and read it back: cuBLAS multiplies.

Nothing is tuned: registers set the tiles (the largest uses 254 of 255), and the sizes of the weight the programs.

Shape legend: r rows, d_in inputs, d_out outputs, c = d_in / 8 codes a row.
"""

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, Variant
from .reference import BLOCK_ELEMENTS

_PROGRAMS = 264  # two for each multiprocessor of an H100
_DENSE_ROWS = 256  # up to so many the weight is decoded in registers
_TILE_OUT, _TILE_CODES = 64, 16  # of the tensor-core path
_POINT = tl.constexpr(5.5)  # what a digit of E8P is above twice its weight
_ROOT = 8.0  # and one of the 1-bit codebook


@triton.jit
def _points(code, table_ptr):
    """Eight digits `2 v + 5.5` of an E8P code."""
    code = code.to(tl.int32)
    entry = tl.load(table_ptr + ((code >> 8) & 0xFF))
    sign = code & 0x7F
    sign = (sign | (sign << 12)) & 0x000F000F
    sign = (sign | (sign << 6)) & 0x03030303
    sign = (sign | (sign << 3)) & 0x11111111
    # The top digit of this product is the sum of the digits; bit 31 of the entry is the pattern's parity.
    sign |= ((sign * 0x11111111) ^ (entry >> 3)) & 0x10000000
    mask = sign * 15
    return ((entry & 0x77777777) ^ mask) - mask + (0x66666666 - ((code >> 7) & 1) * 0x11111111)


@triton.jit
def _digit(word, AT: tl.constexpr, BIAS: tl.constexpr):
    """Digit AT of 8 minus BIAS, float32: `2^k + digit` has the digit in the bits from 23 - k on."""
    PLACE: tl.constexpr = 4 + 4 * (AT % 4)
    K: tl.constexpr = 23 - PLACE
    if AT < 4:
        word = word << 4
    else:
        word = word >> 12
    bits = (word & (15 << PLACE)) | ((127 + K) << 23)
    return bits.to(tl.float32, bitcast=True) - ((1 << K) + BIAS)


@triton.jit
def _second(residual_ptr, offset, mask, patterns_ptr, roots_ptr):
    """Digits of the second stage, 0 where there is none."""
    if residual_ptr is None:
        digits = 0
    elif roots_ptr is None:
        digits = _points(tl.load(residual_ptr + offset, mask, 0), patterns_ptr)
    else:
        digits = tl.load(roots_ptr + tl.load(residual_ptr + offset, mask, 0).to(tl.int32))
    return digits


@triton.jit
def _weight(first, second, inverse, AT: tl.constexpr, OWN: tl.constexpr, BIAS: tl.constexpr):
    """Twice the weight at place AT of 8; OWN and BIAS are those of the two stages, below 0 where there is none."""
    value = _digit(first, AT, OWN)
    if BIAS >= 0:
        value += _digit(second, AT, BIAS) * inverse
    return value


@triton.jit
def _tile(first, second, inverse, OWN: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr):
    """Twice the weights of digits (n, c): (n, 8 c)."""
    w0 = _weight(first, second, inverse, 0, OWN, BIAS).to(DTYPE)
    w1 = _weight(first, second, inverse, 1, OWN, BIAS).to(DTYPE)
    w2 = _weight(first, second, inverse, 2, OWN, BIAS).to(DTYPE)
    w3 = _weight(first, second, inverse, 3, OWN, BIAS).to(DTYPE)
    w4 = _weight(first, second, inverse, 4, OWN, BIAS).to(DTYPE)
    w5 = _weight(first, second, inverse, 5, OWN, BIAS).to(DTYPE)
    w6 = _weight(first, second, inverse, 6, OWN, BIAS).to(DTYPE)
    w7 = _weight(first, second, inverse, 7, OWN, BIAS).to(DTYPE)
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.reshape(tl.join(even, odd), (first.shape[0], 8 * first.shape[1]))


@triton.jit
def _apart(x):
    """x (c, 8) as its 8 columns."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2, 2)))
    a, b = tl.split(even)
    c, d = tl.split(odd)
    x0, x4 = tl.split(a)
    x2, x6 = tl.split(b)
    x1, x5 = tl.split(c)
    x3, x7 = tl.split(d)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _one_row(
    x_ptr, codes_ptr, residual_ptr, patterns_ptr, roots_ptr, y_ptr, d_out, c, inverse,
    OUT: tl.constexpr, CODES: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    start = out.to(tl.int64)[:, None] * c
    here = (out < d_out)[:, None]
    lane = tl.arange(0, CODES)
    total = tl.zeros((OUT, CODES), tl.float32)
    code = tl.load(codes_ptr + start + lane[None, :], here & (lane < c)[None, :], 0)
    for first in range(0, c, CODES):
        column = first + lane
        known = column < c
        x = tl.load(x_ptr + column[:, None] * 8 + tl.arange(0, 8)[None, :], known[:, None], 0.0).to(tl.float32)
        second = _second(residual_ptr, start + column[None, :], here & known[None, :], patterns_ptr, roots_ptr)
        # The next codes are under way while these are decoded.
        ahead = column + CODES
        coming = tl.load(codes_ptr + start + ahead[None, :], here & (ahead < c)[None, :], 0)
        digits = _points(code, patterns_ptr)
        parts = _apart(x)
        for i in tl.static_range(8):
            total += _weight(digits, second, inverse, i, _POINT, BIAS) * parts[i][None, :]
        code = coming
    tl.store(y_ptr + out, tl.sum(total, 1) * 0.5, out < d_out)


@triton.jit
def _some_rows(
    x_ptr, codes_ptr, residual_ptr, patterns_ptr, roots_ptr, y_ptr, rows, d_out, c, x_stride, inverse, share,
    ROWS: tl.constexpr, OUT: tl.constexpr, CODES: tl.constexpr, BIAS: tl.constexpr, PARTS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    start = out.to(tl.int64)[:, None] * c
    here = (out < d_out)[:, None]
    x_row = x_ptr + row.to(tl.int64)[:, None] * x_stride
    lane, wide = tl.arange(0, CODES), tl.arange(0, 8 * CODES)
    total = tl.zeros((OUT, ROWS), tl.float32)
    other = tl.zeros((OUT, ROWS), tl.float32)
    stop = tl.minimum((part + 1) * share, c)
    for first in range(part * share, stop, CODES):
        column = first + lane
        mask = here & (column < stop)[None, :]
        digits = _points(tl.load(codes_ptr + start + column[None, :], mask, 0), patterns_ptr)
        second = _second(residual_ptr, start + column[None, :], mask, patterns_ptr, roots_ptr)
        k = first * 8 + wide
        x = tl.load(x_row + k[None, :], (row < rows)[:, None] & (k < stop * 8)[None, :], 0.0)
        if PARTS == 1:
            total = tl.dot(_tile(digits, second, inverse, _POINT, BIAS, DOT), tl.trans(x.to(DOT)), total)
        else:  # codewords of one stage are exact in bfloat16, float32 inputs are three parts of it
            stage_1 = _tile(digits, 0, inverse, _POINT, -1, DOT)
            for _ in tl.static_range(PARTS):
                piece = x.to(tl.bfloat16)
                total = tl.dot(stage_1, tl.trans(piece.to(DOT)), total)
                if BIAS >= 0:
                    stage_2 = _tile(second, 0, inverse, BIAS, -1, DOT)
                    other = tl.dot(stage_2, tl.trans(piece.to(DOT)), other)
                x -= piece.to(tl.float32)
    if PARTS > 1 and BIAS >= 0:
        total += other * inverse
    offset = (part * rows + row).to(tl.int64)[None, :] * d_out + out[:, None]
    tl.store(y_ptr + offset, total * 0.5, here & (row < rows)[None, :])


@triton.jit(do_not_specialize=["splits"])
def _summed(parts_ptr, y_ptr, count, splits, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(splits):
        total += tl.load(parts_ptr + part * count + index, mask, 0.0)
    tl.store(y_ptr + index, total, mask)


@triton.jit
def _decoded(
    codes_ptr, residual_ptr, patterns_ptr, roots_ptr, y_ptr, d_out, c, stride, residual_stride, inverse,
    OUT: tl.constexpr, CODES: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    column = tl.program_id(1) * CODES + tl.arange(0, CODES)
    mask = (out < d_out)[:, None] & (column < c)[None, :]
    far = out.to(tl.int64)[:, None]
    digits = _points(tl.load(codes_ptr + far * stride + column[None, :], mask, 0), patterns_ptr)
    second = _second(residual_ptr, far * residual_stride + column[None, :], mask, patterns_ptr, roots_ptr)
    value = _tile(digits, second, inverse, _POINT, BIAS, tl.float32) * 0.5
    k = tl.program_id(1) * CODES * 8 + tl.arange(0, 8 * CODES)
    tl.store(y_ptr + far * (8 * c) + k[None, :], value, (out < d_out)[:, None] & (k < 8 * c)[None, :])


def _bias(residual: Tensor | None, roots: Tensor | None) -> float:
    """The kernels' BIAS: which second stage there is."""
    return -1.0 if residual is None else _POINT.value if roots is None else _ROOT


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def e8p_decode(
    codes: Tensor,
    residual: Tensor | None,
    patterns: Tensor,
    roots: Tensor | None,
    residual_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """As in `reference.py`. Bound by what it writes."""
    codes, residual = _dense(codes), residual if residual is None else _dense(residual)
    d_out, c = codes.shape
    y = torch.empty(d_out, 8 * c, dtype=dtype, device=codes.device)
    if d_out:
        _decoded[(triton.cdiv(d_out, _DECODE_OUT), triton.cdiv(c, _DECODE_CODES))](
            codes, residual, patterns, roots, y, d_out, c, codes.stride(0),
            0 if residual is None else residual.stride(0), 1 / residual_scale,
            _DECODE_OUT, _DECODE_CODES, _bias(residual, roots),
        )  # fmt: skip
    return y


def e8p_linear(
    x: Tensor,
    codes: Tensor,
    residual: Tensor | None,
    patterns: Tensor,
    roots: Tensor | None,
    residual_scale: float,
) -> Tensor:
    """As in `reference.py`."""
    rows = len(x)
    if rows > _DENSE_ROWS:
        return _blocks_of_rows(x, codes, residual, patterns, roots, residual_scale)
    x, codes, residual = _dense(x), codes.contiguous(), residual if residual is None else residual.contiguous()
    d_out, c = codes.shape
    y = torch.empty(rows, d_out, dtype=x.dtype, device=x.device)
    if rows == 0 or d_out == 0:
        return y
    arguments = (codes, residual, patterns, roots)
    bias, inverse = _bias(residual, roots), 1 / residual_scale
    if rows == 1:
        out, width, warps = _one_row_sizes(d_out, c, residual is not None)
        _one_row[(triton.cdiv(d_out, out),)](x, *arguments, y, d_out, c, inverse, out, width, bias, num_warps=warps)
        return y
    tile = 16 if rows <= 16 or x.dtype == torch.float32 else 64  # three parts of float32 leave no room for more
    blocks = triton.cdiv(d_out, _TILE_OUT) * triton.cdiv(rows, tile)
    splits, share = _splits(blocks, c)
    sums = y if splits == 1 else torch.empty(splits, rows, d_out, dtype=torch.float32, device=x.device)
    _some_rows[(triton.cdiv(d_out, _TILE_OUT), triton.cdiv(rows, tile), splits)](
        x, *arguments, sums, rows, d_out, c, x.stride(0), inverse, share,
        tile, _TILE_OUT, _TILE_CODES, bias, **_precision(x.dtype),
    )  # fmt: skip
    if splits > 1:
        _summed[(triton.cdiv(y.numel(), _SUM_BLOCK),)](sums, y, y.numel(), splits, _SUM_BLOCK)
    return y


def e8p_linear_backward(
    grad: Tensor,
    codes: Tensor,
    residual: Tensor | None,
    patterns: Tensor,
    roots: Tensor | None,
    residual_scale: float,
) -> Tensor:
    """As in `reference.py`. Training has rows enough to pay for decoding blocks; each has columns of its own."""
    d_out, c = codes.shape
    columns = max(1, BLOCK_ELEMENTS // 8 // max(1, d_out))
    made = []
    for start in range(0, c, columns):
        part = slice(start, start + columns)
        second = None if residual is None else residual[:, part]
        made.append(grad @ e8p_decode(codes[:, part], second, patterns, roots, residual_scale, grad.dtype))
    return made[0] if len(made) == 1 else torch.cat(made, 1)


def _blocks_of_rows(
    x: Tensor,
    codes: Tensor,
    residual: Tensor | None,
    patterns: Tensor,
    roots: Tensor | None,
    residual_scale: float,
) -> Tensor:
    step = max(1, BLOCK_ELEMENTS // x.shape[1])
    made = []
    for start in range(0, max(1, len(codes)), step):
        part = slice(start, start + step)
        second = None if residual is None else residual[part]
        made.append(x @ e8p_decode(codes[part], second, patterns, roots, residual_scale, x.dtype).T)
    return made[0] if len(made) == 1 else torch.cat(made, 1)


def _one_row_sizes(d_out: int, c: int, two_stages: bool) -> tuple[int, int, int]:
    """Outputs and codes of a program's step, and its warps: as many outputs as leave two programs a multiprocessor.

    A thread decodes 16 codes of one stage at a time, or 8 of two, which leaves registers for 16 warps or more.
    """
    out = 16 if d_out >= 256 * 16 else 4
    width = 64 if c < 128 else 128 if two_stages else 256
    return out, width, max(1, out * width // (256 if two_stages else 512))


def _splits(blocks: int, c: int) -> tuple[int, int]:
    """Into how many parts K is cut, and codes of one: at least four steps of the loop each."""
    steps = triton.cdiv(c, _TILE_CODES)
    splits = next(s for s in (1, 2, 4, 8) if s == 8 or blocks * s >= _PROGRAMS or steps < 8 * s)
    return splits, triton.cdiv(steps, splits) * _TILE_CODES


def _precision(dtype: torch.dtype) -> dict[str, Any]:
    """Parts of x, and what tensor cores multiply. The interpreter multiplies what bfloat16 holds as float32."""
    dot = tl.float32 if INTERPRETED else tl.float16 if dtype == torch.float16 else tl.bfloat16
    return {"PARTS": 3 if dtype == torch.float32 else 1, "DOT": dot}


_DECODE_OUT, _DECODE_CODES = 16, 32
_SUM_BLOCK = 1024

_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# Bits, residual, roots.
_STAGES = ((2, None, None), (3, "*u8", "*i32"), (4, "*i16", None))


def variants() -> list[Variant]:
    """Every compilation that a launch may ask for.

    Rows, splits and sizes are arguments. float16 differs by the types of conversions and matrix instructions; what is
    written is float32 or the dtype of x, by a conversion.
    """
    made = []
    for bits, residual, roots in _STAGES:
        bias = -1.0 if residual is None else _POINT.value if roots is None else _ROOT
        codes = {"codes_ptr": "*i16", "patterns_ptr": "*i32", "inverse": "fp32", "d_out": "i32", "c": "i32"}
        fixed: dict[str, Any] = {"BIAS": bias}
        for name, kind in (("residual_ptr", residual), ("roots_ptr", roots)):
            if kind is None:
                fixed[name] = None
            else:
                codes[name] = kind
        for d_out, c in product((4096, 2048), (512, 72)):
            out, width, warps = _one_row_sizes(d_out, c, residual is not None)
            signature = codes | {"x_ptr": "*bf16", "y_ptr": "*bf16"}
            sizes = fixed | {"OUT": out, "CODES": width}
            label = f"one row {bits} bits {out} x {width}"
            made.append(_variant(label, _one_row, signature, sizes, warps, wide=True))
        tile = {"OUT": _TILE_OUT, "CODES": _TILE_CODES}
        tiles = [(16, torch.bfloat16), (64, torch.bfloat16), (16, torch.float32)]
        for rows, dtype in [*tiles, (64, torch.float16)] if bits == 2 else tiles:
            signature = codes | {"x_ptr": _TYPES[dtype], "y_ptr": "*fp32"}
            signature |= dict.fromkeys(("rows", "x_stride", "share"), "i32")
            sizes = fixed | tile | {"ROWS": rows} | _precision(dtype)
            label = f"{rows} rows {bits} bits {_TYPES[dtype][1:]}"
            made.append(_variant(label, _some_rows, signature, sizes, matrix=True))
        signature = codes | {"y_ptr": "*bf16", "stride": "i32", "residual_stride": "i32"}
        sizes = fixed | {"OUT": _DECODE_OUT, "CODES": _DECODE_CODES}
        made.append(_variant(f"decode {bits} bits", _decoded, signature, sizes))
    sums = {"parts_ptr": "*fp32", "y_ptr": "*bf16", "count": "i32", "splits": "i32"}
    made.append(_variant("sum", _summed, sums, {"BLOCK": _SUM_BLOCK}, wide=True))
    return made


def _variant(
    label: str,
    function: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    warps: int = 4,
    matrix: bool = False,
    wide: bool = False,
) -> Variant:
    divisible = [name for name, kind in signature.items() if kind != "fp32" and name not in ("rows", "splits")]
    return Variant(
        label, function, signature, constants, warps, matrix=matrix, bandwidth_bound=wide, divisible=divisible
    )
