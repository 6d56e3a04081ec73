"""The Triton code. Imported on the first launch only.

Shape legend: a product (M, N) = A (M, K) B (K, N), each operand with two strides, so that either side of the gradient
and any transposition is one code: R = Pᵀ G or G P, and P N or N Pᵀ. States lie row by row as (M, N).

What bounds it, for rank r in half precision: W is read and written once; G is read once by each 128 ranks, which run
side by side, so from memory about once. That is r operations a byte of G and r / 2 a byte of W, and an H100 does 263 in
the time of a byte: memory bounds R for r up to about 256 and W up to about 512, matrix instructions beyond. Where R has
too few tiles for all processors, K is split: the parts of R, small then, go through memory (the level-2 cache) to a
second launch, in a fixed order, so that results repeat. So does the whole R with 8-bit states. Otherwise only N is
written of it.
There is no autotuner: it would run updates in place many times, or keep a copy of W.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from ._launch import INTERPRETED, Variant

_GROUP: tl.constexpr = tl.constexpr(8)  # rows of tiles that run side by side and share what they read
_STATE_BLOCK: tl.constexpr = tl.constexpr(256)  # elements of a state that share one scale
_LOG2_10: tl.constexpr = tl.constexpr(3.321928094887362)
# Triton's interpreter multiplies the bits of bfloat16 matrices as integers.
_WIDEN: tl.constexpr = tl.constexpr(INTERPRETED)
# Of float32 products: six products of bfloat16 parts, as exact as float32 and on matrix instructions.
_PRECISION: tl.constexpr = tl.constexpr("ieee" if INTERPRETED else "bf16x6")

_ROWS = 4  # blocks of 256 elements of a program of `_adam`


@triton.jit
def _origin(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column of the tiles, groups of rows first: programs that run together share tiles of A and B."""
    program = tl.program_id(0)
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = program // (_GROUP * columns) * _GROUP
    height = tl.minimum(rows - first, _GROUP)
    place = program % (_GROUP * columns)
    return first + place % height, place // height


@triton.jit
def _product(
    a_ptr, b_ptr, row, column, start, end, M, N, K, a_row, a_column, b_row, b_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of A B at (row, column), of the terms from `start` to `end`. float32."""
    i, j, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    wide_row, wide_column, wide_start = tl.cast(row, tl.int64), tl.cast(column, tl.int64), tl.cast(start, tl.int64)
    a = a_ptr + (wide_row * a_row + wide_start * a_column) + (i[:, None] * a_row + k[None, :] * a_column)
    b = b_ptr + (wide_start * b_row + wide_column * b_column) + (k[:, None] * b_row + j[None, :] * b_column)
    a_inside, b_inside = (row + i < M)[:, None], (column + j < N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(start, end, BLOCK_K):
        inside = k0 + k < K
        left = tl.load(a, a_inside & inside[None, :], 0.0)
        right = tl.load(b, b_inside & inside[:, None], 0.0)
        if _WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=_PRECISION)
        a += BLOCK_K * a_column
        b += BLOCK_K * b_row
    return total


@triton.jit
def _value(code, SIGNED: tl.constexpr):
    """What codes (int32) of the dynamic map stand for, in [-1, 1].

    Counted from zero, decade i of values begins at item 2^i (2^(i+1) without a sign) and has as many: as in a float,
    the exponent is the decade and the mantissa the place in it.
    """
    item = tl.abs(code - 127) if SIGNED else code + 1
    bits = (item.to(tl.float32) + 0.5).to(tl.int32, bitcast=True)  # the middle of the item's part
    decade = (bits >> 23) - (133 if SIGNED else 134)
    place = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    size = tl.exp2(decade.to(tl.float32) * _LOG2_10) * (0.1 + 0.9 * place)
    size = tl.where(item < (1 if SIGNED else 2), 0.0, size)
    size = tl.where(item >= (128 if SIGNED else 256), 1.0, size)
    return tl.where(code < 127, -size, size) if SIGNED else size


@triton.jit
def _code(x, SIGNED: tl.constexpr):
    """The nearest code (int32) of values in [-1, 1]: the inverse of `_value`."""
    FIRST: tl.constexpr = 1 if SIGNED else 2  # items of the lowest decade
    size = tl.abs(x)
    scale = tl.zeros_like(size) + 1e6
    items = tl.zeros_like(size) + FIRST
    for decade in tl.static_range(1, 7):
        # half way between the last value of the decade below and the first of this one
        above = size > 10.0 ** (decade - 7) * (1.0 + 1.8 / (FIRST * 2**decade))
        scale = tl.where(above, 10.0 ** (6 - decade), scale)
        items = tl.where(above, FIRST * 2.0**decade, items)
    place = tl.floor((size * scale - 0.1) * (items * (1.0 / 0.9)))
    item = items + tl.minimum(tl.maximum(place, 0.0), items - 1.0)
    item = tl.where(size < 0.5e-6 * (0.1 + 0.45 / FIRST), FIRST - 1.0, item)
    if SIGNED:
        item = tl.where(x > 1.0 - 0.225 / 64, 128.0, item)  # -1 has no code
        return 127 + tl.where(x < 0, -item, item).to(tl.int32)
    else:
        item = tl.where(x > 1.0 - 0.225 / 128, 256.0, item)
        return item.to(tl.int32) - 1


@triton.jit
def _normalized(r, m, v, beta1, rest1, beta2, rest2, inverse1, inverse2, eps):
    """Adam: the new moments, and the step."""
    m = beta1 * m + rest1 * r
    v = beta2 * v + rest2 * r * r
    return m, v, (m * inverse1) / (tl.sqrt(v * inverse2) + eps)


@triton.jit
def _rounded(x, code_ptr, absmax_ptr, offset, block, mask, block_mask, SIGNED: tl.constexpr):
    """Stores a state as codes with new scales. x (B, 256), block by block."""
    absmax = tl.max(tl.abs(x), 1)
    inverse = 1.0 / tl.maximum(absmax, 1e-37)  # whose inverse is still finite
    tl.store(code_ptr + offset, _code(x * inverse[:, None], SIGNED).to(tl.uint8), mask)
    tl.store(absmax_ptr + block, absmax, block_mask)


@triton.jit
def _step(
    r, n_ptr, m_ptr, m_max_ptr, v_ptr, v_max_ptr, offset, block, mask, block_mask,
    beta1, rest1, beta2, rest2, inverse1, inverse2, eps, BITS: tl.constexpr,
):  # fmt: skip
    """Adam on R at the given offsets: changes the states, writes N. With 8 bits, r is (B, 256), block by block."""
    if BITS == 32:
        m, v = tl.load(m_ptr + offset, mask, 0.0), tl.load(v_ptr + offset, mask, 0.0)
    else:
        m = _value(tl.load(m_ptr + offset, mask, 127).to(tl.int32), True)
        v = _value(tl.load(v_ptr + offset, mask, 0).to(tl.int32), False)
        m *= tl.load(m_max_ptr + block, block_mask, 0.0)[:, None]
        v *= tl.load(v_max_ptr + block, block_mask, 0.0)[:, None]
    m, v, n = _normalized(r, m, v, beta1, rest1, beta2, rest2, inverse1, inverse2, eps)
    if BITS == 32:
        tl.store(m_ptr + offset, m, mask)
        tl.store(v_ptr + offset, v, mask)
    else:
        m, v = tl.where(mask, m, 0.0), tl.where(mask, v, 0.0)
        _rounded(m, m_ptr, m_max_ptr, offset, block, mask, block_mask, True)
        _rounded(v, v_ptr, v_max_ptr, offset, block, mask, block_mask, False)
    tl.store(n_ptr + offset, n, mask)


@triton.jit
def _halves(x):
    """The left and the right half of the columns of a tile."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _strips(x):
    """The columns of a tile in eight parts, in order."""
    left, right = _halves(x)
    left_a, left_b = _halves(left)
    right_a, right_b = _halves(right)
    a, b = _halves(left_a)
    c, d = _halves(left_b)
    e, f = _halves(right_a)
    g, h = _halves(right_b)
    return a, b, c, d, e, f, g, h


@triton.jit
def _project(
    a_ptr, b_ptr, out_ptr, m_ptr, v_ptr, M, N, K, a_row, a_column, b_row, b_column, part_size,
    beta1, rest1, beta2, rest2, inverse1, inverse2, eps,
    FUSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """R = A B: Adam with float32 states on the tile, and N to `out` (M, N); or a part of R to `out` (parts, M, N)."""
    COLUMNS: tl.constexpr = BLOCK_N if BLOCK_N <= 128 else BLOCK_N // 8
    tile_row, tile_column = _origin(M, N, BLOCK_M, BLOCK_N)
    row, column, part = tile_row * BLOCK_M, tile_column * BLOCK_N, tl.program_id(1)
    start = part * part_size
    r = _product(
        a_ptr, b_ptr, row, column, start, tl.minimum(start + part_size, K), M, N, K, a_row, a_column, b_row, b_column,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    i = tl.arange(0, BLOCK_M)
    inside = (row + i < M)[:, None]
    origin = tl.cast(row, tl.int64) * N + column
    if FUSED:
        # A strip of a large tile at a time, or the states take more registers than there are.
        strips = _strips(r) if BLOCK_N > 128 else (r,)
        j = tl.arange(0, COLUMNS)
        for strip in tl.static_range(BLOCK_N // COLUMNS):
            here = origin + strip * COLUMNS
            _step(
                strips[strip], out_ptr + here, m_ptr + here, None, v_ptr + here, None,
                i[:, None] * N + j[None, :], None, inside & (column + strip * COLUMNS + j < N)[None, :], None,
                beta1, rest1, beta2, rest2, inverse1, inverse2, eps, 32,
            )  # fmt: skip
    else:
        j = tl.arange(0, BLOCK_N)
        out = out_ptr + (tl.cast(part, tl.int64) * M * N + origin) + (i[:, None] * N + j[None, :])
        tl.store(out, r, inside & (column + j < N)[None, :])


@triton.jit
def _adam(
    r_ptr, n_ptr, m_ptr, m_max_ptr, v_ptr, v_max_ptr, count,
    beta1, rest1, beta2, rest2, inverse1, inverse2, eps,
    BITS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adam on R, the sum of its parts, ROWS blocks of 256 elements a program. Bound by memory."""
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offset = block.to(tl.int64)[:, None] * _STATE_BLOCK + tl.arange(0, _STATE_BLOCK)[None, :]
    mask = offset < count
    r = tl.load(r_ptr + offset, mask, 0.0)
    for part in tl.static_range(1, PARTS):
        r += tl.load(r_ptr + tl.cast(count, tl.int64) * part + offset, mask, 0.0)
    block_mask = block * _STATE_BLOCK < count
    _step(
        r, n_ptr, m_ptr, m_max_ptr, v_ptr, v_max_ptr, offset, block, mask, block_mask,
        beta1, rest1, beta2, rest2, inverse1, inverse2, eps, BITS,
    )  # fmt: skip


@triton.jit
def _apply(
    w_ptr, a_ptr, b_ptr, M, N, K, w_row, w_column, a_row, a_column, b_row, b_column, keep, rate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W = W keep - rate A B, a tile a program. A and B are small and come from the level-2 cache."""
    # W is on its way during the product, where there are registers for it.
    EARLY: tl.constexpr = BLOCK_N < 256 and w_ptr.dtype.element_ty.primitive_bitwidth == 16
    tile_row, tile_column = _origin(M, N, BLOCK_M, BLOCK_N)
    row, column = tile_row * BLOCK_M, tile_column * BLOCK_N
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask = (row + i < M)[:, None] & (column + j < N)[None, :]
    w_ptr += tl.cast(row, tl.int64) * w_row + tl.cast(column, tl.int64) * w_column
    w_tile = w_ptr + (i[:, None] * w_row + j[None, :] * w_column)
    if EARLY:
        w = tl.load(w_tile, mask, 0.0, eviction_policy="evict_first")
    update = _product(
        a_ptr, b_ptr, row, column, 0, K, M, N, K, a_row, a_column, b_row, b_column, BLOCK_M, BLOCK_N, BLOCK_K
    )
    if not EARLY:
        w = tl.load(w_tile, mask, 0.0, eviction_policy="evict_first")
    w = w.to(tl.float32) * keep - rate * update
    tl.store(w_tile, w.to(w_ptr.dtype.element_ty), mask, eviction_policy="evict_first")


def _low_rank_step(
    grad: Tensor,
    projection: Tensor,
    states: tuple[Tensor | None, ...],
    bits: int,
    scalars: tuple[float, ...],
    right: bool,
) -> Tensor:
    a, b = (grad, projection) if right else (projection.T, grad)
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty(m, n, dtype=projection.dtype, device=grad.device)
    if not out.numel():
        return out
    tile, parts = plan.plan_project(m, n, k, grad.element_size(), plan.processors(grad.device))
    part_size = triton.cdiv(triton.cdiv(k, tile.block_k), parts) * tile.block_k
    grid = (tile.count(m, n), parts)
    sizes = (m, n, k, *a.stride(), *b.stride(), part_size)
    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": plan.STAGES, **tile.constexprs}
    if parts == 1 and bits == 32:  # blocks of 8-bit states cross tiles
        _project[grid](a, b, out, states[0], states[2], *sizes, *scalars, FUSED=True, **options)
        return out
    low = torch.empty(parts, m, n, dtype=torch.float32, device=grad.device)
    _project[grid](a, b, low, None, None, *sizes, *scalars, FUSED=False, **options)
    flat = (triton.cdiv(m * n, _ROWS * 256),)
    _adam[flat](low, out, *states, m * n, *scalars, BITS=bits, PARTS=parts, ROWS=_ROWS)
    return out


def _scalars(beta1: float, beta2: float, eps: float, correction1: float, correction2: float) -> tuple[float, ...]:
    return beta1, 1 - beta1, beta2, 1 - beta2, 1 / correction1, 1 / correction2, eps


def low_rank_step(
    grad: Tensor,
    projection: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    correction1: float,
    correction2: float,
    right: bool,
) -> Tensor:
    """As in `reference.py`."""
    scalars = _scalars(beta1, beta2, eps, correction1, correction2)
    return _low_rank_step(grad, projection, (exp_avg, None, exp_avg_sq, None), 32, scalars, right)


def low_rank_step_8bit(
    grad: Tensor,
    projection: Tensor,
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    correction1: float,
    correction2: float,
    right: bool,
) -> Tensor:
    """As in `reference.py`."""
    states = (exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax)
    return _low_rank_step(
        grad, projection, states, 8, _scalars(beta1, beta2, eps, correction1, correction2), right
    )  # fmt: skip


def apply_step_(weight: Tensor, projection: Tensor, step: Tensor, keep: float, rate: float, right: bool) -> None:
    """As in `reference.py`."""
    a, b = (step, projection.T) if right else (projection, step)
    (m, k), n = a.shape, b.shape[1]
    tile = plan.plan_apply(m, n, k, weight.element_size(), plan.processors(weight.device))
    if weight.numel():
        _apply[(tile.count(m, n),)](
            weight, a, b, m, n, k, *weight.stride(), *a.stride(), *b.stride(), keep, rate,
            **tile.constexprs, num_warps=tile.warps, num_stages=plan.STAGES,
        )  # fmt: skip


_STATES: dict[int, dict[str, str]] = {
    8: {"m_ptr": "*u8", "m_max_ptr": "*fp32", "v_ptr": "*u8", "v_max_ptr": "*fp32"},
    32: {"m_ptr": "*fp32", "v_ptr": "*fp32"},
}
_SCALARS = ("beta1", "rest1", "beta2", "rest2", "inverse1", "inverse2", "eps")


def variants() -> list[Variant]:
    """Every compilation that a launch may ask for, for contiguous matrices whose sizes are multiples of 16."""
    made = [_adam_variant(bits, parts) for bits in (32, 8) for parts in (1, plan.PARTS)]
    for right in (False, True):
        for tile in (plan.MIDDLE, plan.LARGE):
            made += [_project_variant("bf16", right, tile, fused) for fused in (False, True)]
        made += [_apply_variant("bf16", right, tile) for tile in (plan.SMALL, plan.MIDDLE, plan.LARGE)]
    # float32 differs in its products and tile, which one side of each shows.
    return [*made, _project_variant("fp32", True, plan.FLOAT32, True), _apply_variant("fp32", False, plan.FLOAT32)]


def _project_variant(dtype: str, right: bool, tile: plan.Tile, fused: bool) -> Variant:
    """`_project` for one side: G is B on the left and A on the right; P is read as it lies."""
    pointers = {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "out_ptr": f"*{dtype}" if fused else "*fp32"}
    constexprs: dict[str, Any] = {"a_column" if right else "a_row": 1, "b_column": 1, "FUSED": fused, **tile.constexprs}
    if fused:
        pointers |= _STATES[32]
    else:
        constexprs |= {"m_ptr": None, "v_ptr": None}
    sizes = ("M", "N", "K", "a_row" if right else "a_column", "b_row", "part_size")
    label = f"project {'right' if right else 'left'} {dtype} {tile.block_m}x{tile.block_n} fused {fused}"
    return _variant(label, _project, pointers, sizes, _SCALARS, constexprs, tile.warps, matrix=True)


def _apply_variant(dtype: str, right: bool, tile: plan.Tile) -> Variant:
    """`_apply` for one side: P is A on the left and, transposed, B on the right."""
    pointers = dict.fromkeys(("w_ptr", "a_ptr", "b_ptr"), f"*{dtype}")
    sizes = ("M", "N", "K", "w_row", "a_row", "b_column" if right else "b_row")
    constexprs = {"w_column": 1, "a_column": 1, "b_row" if right else "b_column": 1, **tile.constexprs}
    label = f"apply {'right' if right else 'left'} {dtype} {tile.block_m}x{tile.block_n}"
    return _variant(label, _apply, pointers, sizes, ("keep", "rate"), constexprs, tile.warps, matrix=True)


def _adam_variant(bits: int, parts: int) -> Variant:
    pointers = {"r_ptr": "*fp32", "n_ptr": "*bf16", **_STATES[bits]}
    constexprs: dict[str, Any] = {"BITS": bits, "PARTS": parts, "ROWS": _ROWS}
    constexprs |= {name: None for name in _STATES[8] if name not in pointers}
    return _variant(f"adam bits {bits} parts {parts}", _adam, pointers, ("count",), _SCALARS, constexprs, 4)


def _variant(
    label: str,
    function: Any,
    pointers: dict[str, str],
    sizes: tuple[str, ...],
    scalars: tuple[str, ...],
    constexprs: dict[str, Any],
    warps: int,
    matrix: bool = False,
) -> Variant:
    signature = pointers | dict.fromkeys(sizes, "i32") | dict.fromkeys(scalars, "fp32")
    return Variant(
        label, function, signature, constexprs, warps, 3, matrix, bandwidth_bound=True, divisible=(*pointers, *sizes)
    )
