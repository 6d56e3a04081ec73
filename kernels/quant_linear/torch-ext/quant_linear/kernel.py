"""The Triton code. Imported on the first launch only.

Shape legend: n rows, d_in, d_out features, g groups along d_in. Weights are read as they are stored.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, Variant, shape_class, tuned
from .decode import weights
from .few import awq_few, gptq_few

_MULTIPROCESSORS = 132  # of an H100; other cards get more or fewer waves
_LANES = 4  # of `gptq_few`: each warp reads its own stretch of d_in
_COLUMNS = 256  # outputs of one program of `gptq_few`: two loads of 4 words a thread
_SPANS = {8: 16}  # columns of a stretch by bits, 32 where none are named: 8 words of 8 bits would spill
_AWQ_LANES, _AWQ_WORDS = 8, 32  # of `awq_few`: 2 warps, each 4 lanes of 8 threads
# Rows up to which sums are taken without matrix instructions, by `awq`: two rows of its 8 sums a word spill registers.
_FEW = {False: 2, True: 1}
_SUM_BLOCK = 128
_WIDEN = tl.constexpr(INTERPRETED)  # the interpreter's products of bfloat16 are wrong
_HALF = (torch.float16, torch.bfloat16)
_TRITON = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _dot(a, b, total):
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit(do_not_specialize=["n", "steps", "size"])
def _many(
    x_ptr, q_ptr, z_ptr, s_ptr, g_ptr, bias_ptr, y_ptr, n, d_in, d_out, width, group_size, steps, size,
    BITS: tl.constexpr, OFFSET: tl.constexpr, AWQ: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Up to 64 rows: bound by the bandwidth of qweight; above, by tensor cores and by decoding once for BLOCK_M rows.

    Programs that share a tile of the weight follow each other, so that it comes from memory once. Those of the
    grid's second dimension share d_in and write partial sums one after the other into `y_ptr`.
    """
    tiles = tl.cdiv(n, BLOCK_M)
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(0) // tiles * BLOCK_N
    split = tl.program_id(1)
    x_row = x_ptr + row.to(tl.int64)[:, None] * d_in
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(split * steps, tl.minimum(split * steps + steps, tl.cdiv(d_in, BLOCK_K))):
        k0 = step * BLOCK_K
        k = (k0 + tl.arange(0, BLOCK_K))[None, :]
        x = tl.load(x_row + k, (row < n)[:, None] & (k < d_in), 0.0)
        w = weights(q_ptr, z_ptr, s_ptr, g_ptr, k0, n0, d_in, d_out, width, group_size, BITS, OFFSET, AWQ,
                     BLOCK_K, BLOCK_N)  # fmt: skip
        total = _dot(x, w.to(x.dtype), total)
    column = n0 + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, column < d_out, 0.0).to(tl.float32)[None, :]
    y_row = y_ptr + (split * n + row).to(tl.int64)[:, None] * d_out
    tl.store(y_row + column[None, :], total, (row < n)[:, None] & (column < d_out)[None, :])


@triton.jit(do_not_specialize=["n", "steps", "size"])
def _gradient(
    g_out_ptr, q_ptr, z_ptr, s_ptr, g_ptr, gx_ptr, n, d_in, d_out, width, group_size, steps, size,
    BITS: tl.constexpr, OFFSET: tl.constexpr, AWQ: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As `_many`, for the gradient with respect to x: the same tiles of the weight, transposed, summed over d_out."""
    tiles = tl.cdiv(n, BLOCK_M)
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = tl.program_id(0) // tiles * BLOCK_K
    split = tl.program_id(1)
    g_row = g_out_ptr + row.to(tl.int64)[:, None] * d_out
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for step in range(split * steps, tl.minimum(split * steps + steps, tl.cdiv(d_out, BLOCK_N))):
        n0 = step * BLOCK_N
        column = (n0 + tl.arange(0, BLOCK_N))[None, :]
        g = tl.load(g_row + column, (row < n)[:, None] & (column < d_out), 0.0)
        w = weights(q_ptr, z_ptr, s_ptr, g_ptr, k0, n0, d_in, d_out, width, group_size, BITS, OFFSET, AWQ,
                     BLOCK_K, BLOCK_N)  # fmt: skip
        total = _dot(g, tl.trans(w.to(g.dtype)), total)
    k = k0 + tl.arange(0, BLOCK_K)
    gx_row = gx_ptr + (split * n + row).to(tl.int64)[:, None] * d_in
    tl.store(gx_row + k[None, :], total, (row < n)[:, None] & (k < d_in)[None, :])


@triton.jit(do_not_specialize=["parts"])
def _sum_parts(parts_ptr, bias_ptr, y_ptr, parts, count, width, BLOCK: tl.constexpr):
    """Partial sums (parts, count) to y (count,), always in the same order, eight loads at a time."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    part = tl.arange(0, 8)
    totals = tl.zeros((8, BLOCK), tl.float32)
    for start in range(0, parts, 8):
        mask = (start + part < parts)[:, None] & inside[None, :]
        at = parts_ptr + (start + part).to(tl.int64)[:, None] * count + index[None, :]
        totals += tl.load(at, mask, 0.0)
    total = tl.sum(totals, 0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + index % width, inside, 0.0).to(tl.float32)
    tl.store(y_ptr + index, total, inside)


def _span(bits: int) -> int:
    return _SPANS.get(bits, 32)


class _Weight(NamedTuple):
    """A packed weight and how to read it."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None
    bits: int
    group_size: int  # d_in for one group
    offset: int
    awq: bool
    d_in: int
    d_out: int

    def block(self, dtype: torch.dtype) -> int:
        """Columns of a tile, which always lie in one group where there is no g_idx."""
        whole = self.group_size >= self.d_in or self.group_size % 64 == 0
        return 64 if self.g_idx is None and whole and dtype != torch.float32 else 32


def _weight(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, group_size: int, offset: int,
    awq: bool = False,
) -> _Weight:  # fmt: skip
    d_in = qweight.shape[0] if awq else qweight.shape[0] * 32 // bits
    size = d_in if group_size == -1 else group_size
    qweight, qzeros, scales = (t.contiguous() for t in (qweight, qzeros, scales))
    index = None if g_idx is None else g_idx.contiguous()
    if index is None and size < d_in and size % 32:  # tiles cross groups
        index = torch.arange(d_in, dtype=torch.int32, device=qweight.device) // size
    return _Weight(qweight, qzeros, scales, index, bits, size, offset, awq, d_in, scales.shape[1])


def _splits(programs: int, steps: int, wanted: int) -> tuple[int, int]:
    """Into how many runs of how many steps a sum is split so that about `wanted` programs share the work."""
    each = triton.cdiv(steps, max(1, min(steps, wanted // programs)))
    return triton.cdiv(steps, each), each


def _is_for_few(x: Tensor, w: _Weight) -> bool:
    few = 1 if x.dtype == torch.float32 else _FEW[w.awq]  # two rows of float32 spill registers on sm_80
    return len(x) <= few and w.g_idx is None and w.d_in % 4 == 0


def _sums_of_few(x: Tensor, w: _Weight) -> Tensor:
    """Partial sums (parts, n, d_out) float32 of one or two rows."""
    n, kind = len(x), _TRITON[x.dtype]
    if x.dtype in _HALF:
        x = (x if x.data_ptr() % 8 == 0 else x.clone()).view(torch.int64)
    lanes, columns = (_AWQ_LANES, 8 * _AWQ_WORDS) if w.awq else (_LANES, _COLUMNS)
    blocks = triton.cdiv(w.d_out, columns)
    parts, steps = _splits(blocks, triton.cdiv(w.d_in, lanes * _span(w.bits)), 8 * _MULTIPROCESSORS)
    sums = torch.empty(parts, n, w.d_out, dtype=torch.float32, device=x.device)
    tensors, sizes = (x, w.qweight, w.qzeros, w.scales, sums), (n, w.d_in, w.d_out)
    rows = triton.next_power_of_2(n)
    if w.awq:
        awq_few[blocks, parts](
            *tensors, *sizes, w.qweight.shape[1], w.group_size, steps, rows, _span(4), kind, _AWQ_LANES, _AWQ_WORDS,
            num_warps=2,
        )  # fmt: skip
    else:
        gptq_few[blocks, parts](
            *tensors, *sizes, w.group_size, steps, w.bits, w.offset, rows, _span(w.bits), kind, _LANES, _COLUMNS,
            num_warps=_LANES,
        )  # fmt: skip
    return sums


# BLOCK_M, BLOCK_N, warps, stages by the largest number of rows; above, the tuner chooses. Float32 has no matrix
# instructions of full precision: a small tile whatever the rows.
_TILES = {16: (16, 128, 4, 4), 64: (64, 128, 4, 3)}
_WIDE_TILE = (32, 32, 4, 2)
# The larger tile decodes less often; the smaller leaves room for more programs.
_TUNED_TILES = ((128, 128, 8, 3), _TILES[64])


def _tile(n: int, dtype: torch.dtype) -> tuple[int, int, int, int] | None:
    """None where the tuner is to choose."""
    if dtype == torch.float32:
        return _WIDE_TILE
    return next((tile for rows, tile in _TILES.items() if n <= rows), None)


def _configs() -> list[triton.Config]:
    return [triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=w, num_stages=s) for m, n, w, s in _TUNED_TILES]


_TUNING_KEY = ("size", "BITS", "AWQ", "BLOCK_K")
_tuned_many = tuned(_configs(), _TUNING_KEY)(_many)
_tuned_gradient = tuned(_configs(), _TUNING_KEY)(_gradient)


def _multiply(x: Tensor, w: _Weight, bias: Tensor | None, backward: bool) -> Tensor:
    """x W + bias for x (n, d_in), or x Wᵀ for x (n, d_out), by matrix instructions."""
    n = len(x)
    tile = _tile(n, x.dtype)
    block_m, block_n, warps, stages = tile or _TUNED_TILES[0]
    block_k = w.block(x.dtype)
    columns, inner, out_block, step = w.d_out, w.d_in, block_n, block_k
    if backward:
        columns, inner, out_block, step = w.d_in, w.d_out, block_k, block_n
    programs = triton.cdiv(n, block_m) * triton.cdiv(columns, out_block)
    parts, steps = _splits(programs, triton.cdiv(inner, step), 2 * _MULTIPROCESSORS)
    y = torch.empty(n, columns, dtype=x.dtype, device=x.device)
    to = torch.empty(parts, n, columns, dtype=torch.float32, device=x.device) if parts > 1 else y
    at_once = bias if parts == 1 else None

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        width = meta["BLOCK_K"] if backward else meta["BLOCK_N"]
        return triton.cdiv(n, meta["BLOCK_M"]) * triton.cdiv(columns, width), parts

    args: tuple[Any, ...] = (x, w.qweight, w.qzeros, w.scales, w.g_idx)
    args += (to,) if backward else (at_once, to)
    size = shape_class(x, (n > 128) + (n > 512))
    args += (n, w.d_in, w.d_out, w.qweight.shape[1], w.group_size, steps, size)
    meta: dict[str, Any] = {"BITS": w.bits, "OFFSET": w.offset, "AWQ": w.awq, "BLOCK_K": block_k}
    if tile is None:
        (_tuned_gradient if backward else _tuned_many)[grid](*args, **meta)
    else:
        meta |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
        (_gradient if backward else _many)[grid](*args, **meta)
    return y if parts == 1 else _add_parts(to, bias, y)


def _add_parts(sums: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    count = y.numel()
    _sum_parts[(triton.cdiv(count, _SUM_BLOCK),)](sums, bias, y, len(sums), count, y.shape[1], _SUM_BLOCK)
    return y


def _forward(x: Tensor, w: _Weight, bias: Tensor | None) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    n = len(x)
    if not n:
        return x.new_empty(0, w.d_out)
    if _is_for_few(x, w):
        return _add_parts(_sums_of_few(x, w), bias, x.new_empty(n, w.d_out))
    return _multiply(x, w, bias, backward=False)


def _backward(grad: Tensor, w: _Weight) -> Tensor:
    return _multiply(grad.contiguous(), w, None, backward=True) if len(grad) else grad.new_empty(0, w.d_in)


def gptq_linear(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bias: Tensor | None,
    bits: int, group_size: int, zero_offset: int,
) -> Tensor:  # fmt: skip
    """As in `reference.py`."""
    return _forward(x, _weight(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset), bias)


def gptq_linear_backward(
    grad: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None,
    bits: int, group_size: int, zero_offset: int,
) -> Tensor:  # fmt: skip
    """As in `reference.py`."""
    return _backward(grad, _weight(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset))


def awq_linear(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """As in `reference.py`."""
    return _forward(x, _weight(qweight, qzeros, scales, None, 4, group_size, 0, awq=True), bias)


def awq_linear_backward(grad: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """As in `reference.py`."""
    return _backward(grad, _weight(qweight, qzeros, scales, None, 4, group_size, 0, awq=True))


def variants() -> list[Variant]:
    """Every compilation that a launch or the tuner may ask for, up to what does not change what the code does.

    Splits, steps, rows and sizes are arguments, so one code serves them all. Products: a way to unpack (bits, or
    AWQ) and one to find groups (tiles of 64 or 32 columns in one group, or an index) are steps of their own; each is
    compiled with every tile, in both directions. float16 differs from bfloat16 by the types of conversions and matrix
    instructions alone, dtypes of scales and bias by a conversion, zero_offset by a constant.
    """
    made = [_of_few(bits, rows) for bits in (2, 3, 4, 8) for rows in (1, 2)]
    made += [_of_few(bits, 1, tl.float32) for bits in (2, 3, 4, 8)] + [_of_few(4, 1, tl.float16)]
    made += [_of_awq(tl.bfloat16), _of_awq(tl.float32)]
    for backward in (False, True):
        for tile in (_TILES[16], *_TUNED_TILES):
            made += [_of_product(bits, tile, backward=backward) for bits in (2, 3, 4, 8, 0)]
            made += [_of_product(4, tile, 32, index, backward=backward) for index in (False, True)]
        made.append(_of_product(4, _WIDE_TILE, 32, kind="*fp32", backward=backward))
    made += [_of_product(4, tile, kind="*fp16") for tile in (_TILES[16], *_TUNED_TILES)]
    made += [_of_product(bits, _WIDE_TILE, 32, kind="*fp32") for bits in (3, 0)]
    sums = {"parts_ptr": "*fp32", "y_ptr": "*bf16", "parts": "i32", "count": "i32", "width": "i32"}
    constexprs = {"BLOCK": _SUM_BLOCK, "bias_ptr": None}
    made.append(Variant("sum", _sum_parts, sums, constexprs, divisible=["parts_ptr", "y_ptr", "count", "width"]))
    return made


_OF_FEW = {"x_ptr": "*i64", "q_ptr": "*i32", "z_ptr": "*i32", "s_ptr": "*fp16", "sums_ptr": "*fp32"}
_OF_FEW |= dict.fromkeys(("n", "d_in", "d_out", "group_size", "steps"), "i32")
_DIVISIBLE_OF_FEW = ("x_ptr", "q_ptr", "z_ptr", "s_ptr", "sums_ptr", "d_in", "d_out", "group_size")


def _of_few(bits: int, rows: int, kind: Any = tl.bfloat16) -> Variant:
    signature = _OF_FEW | ({"x_ptr": "*fp32"} if kind == tl.float32 else {})
    constexprs = {"BITS": bits, "OFFSET": 1, "ROWS": rows, "SPAN": _span(bits), "x_type": kind}
    constexprs |= {"LANES": _LANES, "COLUMNS": _COLUMNS}
    label = f"few {bits} bits, {rows} rows, {kind}"
    return Variant(
        label, gptq_few, signature, constexprs, _LANES, bandwidth_bound=True, divisible=_DIVISIBLE_OF_FEW
    )  # fmt: skip


def _of_awq(kind: Any) -> Variant:
    signature = _OF_FEW | {"width": "i32"} | ({"x_ptr": "*fp32"} if kind == tl.float32 else {})
    constexprs = {"ROWS": 1, "SPAN": _span(4), "x_type": kind, "LANES": _AWQ_LANES, "WORDS": _AWQ_WORDS}
    divisible = [*_DIVISIBLE_OF_FEW, "width"]
    return Variant(f"few awq, {kind}", awq_few, signature, constexprs, 2, bandwidth_bound=True, divisible=divisible)


def _of_product(
    bits: int, tile: tuple[int, int, int, int], block_k: int = 64, index: bool = False, kind: str = "*bf16",
    backward: bool = False,
) -> Variant:  # fmt: skip
    """Of 0 bits: AWQ."""
    m, n, warps, stages = tile
    signature = dict.fromkeys(("q_ptr", "z_ptr"), "*i32") | {"s_ptr": "*fp16", "g_ptr": "*i32"}
    signature |= dict.fromkeys(("g_out_ptr", "gx_ptr") if backward else ("x_ptr", "bias_ptr", "y_ptr"), kind)
    constexprs: dict[str, Any] = {"BITS": bits or 4, "OFFSET": int(bits > 0), "AWQ": not bits}
    constexprs |= {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": block_k} | ({} if index else {"g_ptr": None})
    signature |= dict.fromkeys(("n", "d_in", "d_out", "width", "group_size", "steps", "size"), "i32")
    divisible = [name for name in signature if name.endswith("ptr") and name not in constexprs]
    divisible += ["d_in", "d_out", "width", "group_size"]
    label = f"{'gradient' if backward else 'many'} {bits or 'awq'} {tile} {block_k}{' index' * index} {kind}"
    function = _gradient if backward else _many
    return Variant(label, function, signature, constexprs, warps, stages, kind != "*fp32", divisible=divisible)
