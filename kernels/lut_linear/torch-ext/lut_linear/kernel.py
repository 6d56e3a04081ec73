"""The Triton code. Imported on the first launch only.

Shape legend: n rows of activations, d_in, d_out features; a chunk is 32 consecutive weights of a row, 16 bytes.

What a weight costs decides the design. At 75 % of an H100's bandwidth a multiprocessor gets 20 weights a clock, which
leaves 6 instructions a weight. A table of 16 float32 values fits into the lanes of a warp, and a warp shuffle reads one
lane's register from all others, 32 values a clock, exactly, without bank conflicts, and looks at the low bits of its
index only: shift, shuffle, multiply-add. Where there is no such instruction, the table is read through the L1 cache.
"""

# Triton does not compile (*a, b).
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, Variant, shape_class, tuned
from .tiles import lookup, octet_shifts, scale_of, stack, weight_tile

_CHUNK = 32  # weights that one 128-bit load brings
_FEW = 4  # rows up to which multiply-adds on the ordinary cores keep up with memory
_PROGRAMS = 264  # two for each multiprocessor of an H100: fewer are split over the summed dimension
_MOST_SPLITS = 16
_LANES = 64 if torch.version.hip else 32  # threads of a warp
_REDUCE = 1024  # elements of a program of `_reduce`
_WIDEN: tl.constexpr = tl.constexpr(INTERPRETED)  # the interpreter multiplies the bits of bfloat16 matrices


@triton.jit
def _few_rows(
    x_ptr, packed_ptr, table_ptr, absmax_ptr, map_ptr, nested_ptr, offset_ptr, bias_ptr, y_ptr, n, d_in, d_out,
    x_stride, SHIFT: tl.constexpr, N: tl.constexpr, R: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ for at most N rows. A program makes R columns of y, its threads share d_in: no second pass for the sum.

    Bound by the bytes of the packed weight: each is read once, 128 bits a thread, R loads in flight. Tensors have no
    dimension for R, so that all lanes of a warp look up in one row's table.
    """
    first = tl.program_id(0) * R
    chunk = tl.arange(0, CHUNKS)
    octet = tl.arange(0, 8)
    quad = tl.arange(0, 4)
    chunks = d_in // 32
    sums = ()
    for _ in tl.static_range(R * N):
        sums = sums + (tl.zeros((CHUNKS,), tl.float32),)
    for start in range(0, chunks, CHUNKS):
        inside = start + chunk < chunks
        loaded = ()
        for r in tl.static_range(R):
            row = tl.minimum(first + r, d_out - 1)
            word = packed_ptr.to(tl.pointer_type(tl.int32)) + (row * chunks + start) * 4
            words = tl.load(word + chunk[:, None] * 4 + quad[None, :], inside[:, None], 0)
            even, odd = tl.split(tl.reshape(words, (CHUNKS, 2, 2)))
            w0, w2 = tl.split(even)
            w1, w3 = tl.split(odd)
            loaded = loaded + (
                w0,
                w1,
                w2,
                w3,
            )
        parts = ()
        for _ in tl.static_range(R * N):
            parts = parts + (tl.zeros((CHUNKS, 8), tl.float32),)
        for w in tl.static_range(4):
            xs = ()
            for i in tl.static_range(N):
                at = x_ptr + i * x_stride + (start + chunk[:, None]) * 32 + w * 8 + octet[None, :]
                left = tl.where(i < n, chunks - start, 0)
                xs = xs + (tl.load(at, chunk[:, None] < left, 0.0).to(tl.float32),)
            more = ()
            for r in tl.static_range(R):
                row = tl.minimum(first + r, d_out - 1)
                table = table_ptr + row * 16 if absmax_ptr is None else table_ptr
                values = lookup(table, loaded[4 * r + w][:, None] >> octet_shifts()[None, :])
                for i in tl.static_range(N):
                    more = more + (parts[r * N + i] + values * xs[i],)
            parts = more
        new = ()
        for r in tl.static_range(R):
            row = tl.minimum(first + r, d_out - 1)
            for i in tl.static_range(N):
                part = tl.sum(parts[r * N + i], 1)
                if absmax_ptr is not None:
                    block = (row * chunks + start + chunk) >> SHIFT
                    part *= scale_of(block, inside, absmax_ptr, map_ptr, nested_ptr, offset_ptr)
                new = new + (sums[r * N + i] + part,)
        sums = new
    total = tl.sum(stack(sums, CHUNKS, R * N), 0)
    which = tl.arange(0, R * N)
    column, i = first + which // N, which % N
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, column < d_out, 0.0).to(tl.float32)
    tl.store(y_ptr + i * d_out + column, total, (column < d_out) & (i < n))


@triton.jit
def _dot(x, w, acc, PRECISION: tl.constexpr):
    w = w.to(x.dtype)
    if _WIDEN:
        return tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(x, w, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["n", "steps", "size"])
def _many_rows(
    x_ptr, packed_ptr, table_ptr, absmax_ptr, map_ptr, nested_ptr, offset_ptr, bias_ptr, y_ptr, n, d_in, d_out,
    x_stride, steps, size, SHIFT: tl.constexpr, ALIGNED: tl.constexpr, BACKWARD: tl.constexpr, M: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ, or x W for the gradient: an (M, C) tile of y a program, `steps` tiles of weights decoded in registers.

    Bound by the tensor cores from about a hundred rows on. With several programs on the grid's second axis each sums
    its own part of the depth, for `_reduce`.
    """
    cols = d_in if BACKWARD else d_out
    depth = d_out if BACKWARD else d_in
    # 8 blocks of rows side by side share the packed columns in the L2 cache, and 8 columns' worth of x.
    blocks_m, blocks_c = tl.cdiv(n, M), tl.cdiv(cols, C)
    group = tl.program_id(0) // (8 * blocks_c)
    height = tl.minimum(blocks_m - group * 8, 8)
    within = tl.program_id(0) % (8 * blocks_c)
    row = (group * 8 + within % height) * M + tl.arange(0, M)
    first = within // height * C
    x_row = x_ptr + row[:, None].to(tl.int64) * x_stride
    start = tl.program_id(1) * steps * K
    acc = tl.zeros((M, C), tl.float32)
    for step in range(steps):
        k = start + step * K
        at = k + tl.arange(0, K)
        x = tl.load(x_row + at[None, :], (row[:, None] < n) & (at[None, :] < depth), 0.0)
        if BACKWARD:
            w = weight_tile(
                packed_ptr, table_ptr, absmax_ptr, map_ptr, nested_ptr, offset_ptr, k, first, d_in, d_out,
                SHIFT, ALIGNED, K, C,
            )  # fmt: skip
            acc = _dot(x, w, acc, PRECISION)
        else:
            w = weight_tile(
                packed_ptr, table_ptr, absmax_ptr, map_ptr, nested_ptr, offset_ptr, first, k, d_in, d_out,
                SHIFT, ALIGNED, C, K,
            )  # fmt: skip
            acc = _dot(x, tl.trans(w), acc, PRECISION)
    column = first + tl.arange(0, C)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, column < cols, 0.0).to(tl.float32)[None, :]
    y_row = y_ptr + (tl.program_id(1) * n + row[:, None]).to(tl.int64) * cols
    tl.store(y_row + column[None, :], acc, (row[:, None] < n) & (column[None, :] < cols))


@triton.jit(do_not_specialize=["splits"])
def _reduce(parts_ptr, bias_ptr, y_ptr, count, cols, splits, BLOCK: tl.constexpr):
    """y = the sum of the parts (splits, count), in their order, plus the bias (cols,)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(parts_ptr + split * count + at, mask, 0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % cols, mask, 0.0).to(tl.float32)
    tl.store(y_ptr + at, total, mask)


# Few rows: one configuration, as many loads in flight as registers allow. For more rows:
# rows, columns, depth and warps of a tile of `_many_rows`, by whether it is for the gradient: such that AMD's 64 KiB
# hold it as well. Up to 16 rows, up to 64, and above; there the tuner chooses between the last two.
_TILES = {
    False: ((16, 32, 128, 4), (64, 64, 64, 4), (128, 128, 64, 8)),
    True: ((16, 64, 64, 4), (64, 64, 32, 4), (128, 128, 32, 8)),
}
# Exact products have no tensor cores. Rows that are no whole chunks take a load a weight: more columns would spill.
_WIDE_TILE = (16, 64, 32, 4)
_RAGGED_TILES = {True: (16, 32, 32, 4), False: (64, 32, 32, 4)}  # by whether there are few rows, or float32


def _tile(n: int, dtype: torch.dtype, backward: bool, aligned: bool = True) -> tuple[int, int, int, int]:
    """What a launch of n rows takes, up to the tuner's choice above 64."""
    if not aligned:
        return _RAGGED_TILES[n <= 16 or dtype == torch.float32]
    if dtype == torch.float32:
        return _WIDE_TILE
    return _TILES[backward][(n > 16) + (n > 64)]


def _tuner(backward: bool) -> Any:
    """The larger tile decodes less often; the smaller leaves room for more programs."""
    configs = [triton.Config({"M": m, "C": c}, num_warps=warps) for m, c, _, warps in _TILES[backward][:0:-1]]
    return tuned(configs, ("size", "K", "SHIFT"))(_many_rows)


_TUNERS = {backward: _tuner(backward) for backward in (False, True)}


def _columns(rows: int, d_out: int) -> tuple[int, int]:
    """N and R of `_few_rows`: as many loads in flight as registers allow, while enough programs remain."""
    if rows == 1:
        return 1, 4 if d_out >= 4 * _PROGRAMS else 1
    return (2, 2) if rows == 2 else (4, 2)


def _chunks(d_in: int) -> int:
    """Threads of a program of `_few_rows`, each of which takes a chunk at a time."""
    return min(128, max(64, triton.next_power_of_2(d_in // _CHUNK)))


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
    """As in `reference.py`."""
    n, d_in = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty(n, out_features, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    weight = (packed, table, absmax, nested_map, nested_absmax, nested_offset)
    aligned = _aligned(packed, d_in)
    if n > _FEW or not aligned:
        return _product(x, weight, bias, y, d_in, out_features, block_size, False)
    rows, columns = _columns(n, out_features)
    chunks = _chunks(d_in)
    _few_rows[(triton.cdiv(out_features, columns),)](
        x, *weight, bias, y, n, d_in, out_features, x.stride(0), _shift(block_size), rows, columns, chunks,
        num_warps=chunks // _LANES,
    )  # fmt: skip
    return y


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
    """As in `reference.py`."""
    n, d_out = grad.shape
    if grad.stride(1) != 1:
        grad = grad.contiguous()
    weight = (packed, table, absmax, nested_map, nested_absmax, nested_offset)
    y = torch.empty(n, in_features, dtype=grad.dtype, device=grad.device)
    return _product(grad, weight, None, y, in_features, d_out, block_size, True) if y.numel() else y


def _aligned(packed: Tensor, d_in: int) -> bool:
    """Whether every row of the packed weight consists of chunks that 128-bit loads reach."""
    return d_in % _CHUNK == 0 and packed.data_ptr() % 16 == 0


def _shift(block_size: int) -> int:
    """The logarithm of chunks a block."""
    return (block_size // _CHUNK).bit_length() - 1


def _product(
    x: Tensor, weight: tuple[Any, ...], bias: Tensor | None, y: Tensor, d_in: int, d_out: int, block_size: int,
    backward: bool,
) -> Tensor:  # fmt: skip
    """Launches `_many_rows` and, where the tiles of y are too few for all multiprocessors, `_reduce`."""
    (n, depth), cols = x.shape, y.shape[1]
    aligned = _aligned(weight[0], d_in)
    m, c, k, warps = _tile(n, x.dtype, backward, aligned)
    programs = triton.cdiv(n, m) * triton.cdiv(cols, c)
    every = triton.cdiv(depth, k)
    splits = min(triton.cdiv(_PROGRAMS, programs), every, _MOST_SPLITS) if 2 * programs <= _PROGRAMS else 1
    steps = triton.cdiv(every, max(splits, 1))
    splits = triton.cdiv(every, steps) if steps else 1
    parts = y if splits <= 1 else torch.empty(splits, n, cols, dtype=torch.float32, device=y.device)
    args = (x, *weight, bias if splits <= 1 else None, parts, n, d_in, d_out, x.stride(0), steps)
    args += (shape_class(x, (n > 128) + (n > 512)),)
    meta: dict[str, Any] = {"SHIFT": _shift(block_size), "ALIGNED": aligned, "BACKWARD": backward, "K": k}
    meta["PRECISION"] = "ieee" if x.dtype == torch.float32 else "tf32"
    if (m, c, k, warps) == _TILES[backward][2]:
        _TUNERS[backward][
            lambda tile: (triton.cdiv(n, tile["M"]) * triton.cdiv(cols, tile["C"]), max(splits, 1))
        ](*args, **meta)  # fmt: skip
    else:
        _many_rows[(programs, max(splits, 1))](*args, **meta, M=m, C=c, num_warps=warps)
    if splits > 1:
        count = n * cols
        _reduce[(triton.cdiv(count, _REDUCE),)](parts, bias, y, count, cols, splits, _REDUCE)
    return y


_POINTERS = (
    "x_ptr",
    "packed_ptr",
    "table_ptr",
    "absmax_ptr",
    "map_ptr",
    "nested_ptr",
    "offset_ptr",
    "bias_ptr",
    "y_ptr",
)


def _typed(kind: str, x: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of the pointers, and those that a launch leaves out: scales in 8 bits, in float32, or a table a row."""
    types = dict(zip(_POINTERS, (x, "*u8", "*fp32", "*u8", "*fp32", "*fp32", "*fp32", x, x), strict=True))
    absent = {"nested": (), "plain": ("map_ptr", "nested_ptr", "offset_ptr")}.get(kind, _POINTERS[3:7])
    types |= {"absmax_ptr": "*fp32"} if kind == "plain" else {"table_ptr": "*fp16"} if kind == "rows" else {}
    sizes = dict.fromkeys(("n", "d_in", "d_out", "x_stride"), "i32")
    return {k: v for k, v in types.items() if k not in absent} | sizes, dict.fromkeys(absent)


# `_many_rows` by scales, whether rows are whole chunks, direction, rows and dtype.
_MANY = [("nested", True, backward, n, "*bf16") for n in (16, 64, 128) for backward in (False, True)]
_MANY += [("nested", False, backward, n, "*bf16") for n in (16, 64) for backward in (False, True)]
_MANY += [("plain", True, False, 128, "*bf16"), ("rows", True, False, 16, "*bf16"), ("rows", True, False, 64, "*bf16")]
_MANY += [("rows", True, False, 128, "*bf16"), ("rows", True, True, 128, "*bf16"), ("rows", False, False, 64, "*bf16")]
_MANY += [("nested", True, backward, 16, "*fp32") for backward in (False, True)]
_MANY += [("nested", False, False, 16, "*fp32"), ("nested", True, False, 128, "*fp16")]


def variants() -> list[Variant]:
    """Every compilation that a launch or the tuner may ask for, up to what does not change what the code does.

    The splits of a sum, its steps and all sizes are arguments. float16 differs by the types of conversions and matrix
    instructions, block sizes by a shift, plain scales by loads that nested ones have as well.
    """
    made = []
    few = [("nested", 1, 4, 128), ("nested", 1, 1, 64), ("nested", 1, 4, 64), ("nested", 1, 1, 128)]
    few += [("nested", 2, 2, 128), ("nested", 4, 2, 128), ("nested", 2, 2, 64), ("nested", 4, 2, 64)]
    for kind, n, r, chunks in [*few, ("plain", 1, 4, 128), ("rows", 1, 4, 128), ("rows", 4, 2, 128)]:
        types, absent = _typed(kind, "*bf16")
        consts = absent | {"SHIFT": 1, "N": n, "R": r, "CHUNKS": chunks}
        label = f"few_rows {kind} {n} x {r}, {chunks} threads"
        divisible = [name for name in types if name != "n"]
        made.append(Variant(label, _few_rows, types, consts, chunks // 32, bandwidth_bound=True, divisible=divisible))
    for kind, aligned, backward, n, x in _MANY:
        types, absent = _typed(kind, x)
        m, c, k, warps = _tile(n, torch.float32 if x == "*fp32" else torch.bfloat16, backward, aligned)
        consts = absent | {"SHIFT": 1, "ALIGNED": aligned, "BACKWARD": backward, "M": m, "C": c, "K": k}
        consts["PRECISION"] = "ieee" if x == "*fp32" else "tf32"
        label = f"many_rows {kind} {x} {m} x {c}{', ragged' * (not aligned)}{', backward' * backward}"
        divisible = [name for name in types if name != "n" and (aligned or not name.startswith("d_"))]
        types |= dict.fromkeys(("steps", "size"), "i32")
        made.append(Variant(label, _many_rows, types, consts, warps, matrix=x != "*fp32", divisible=divisible))
    types = {
        "parts_ptr": "*fp32",
        "bias_ptr": "*bf16",
        "y_ptr": "*bf16",
        "count": "i32",
        "cols": "i32",
        "splits": "i32",
    }
    divisible = ["parts_ptr", "bias_ptr", "y_ptr", "count", "cols"]
    reduce = Variant("reduce", _reduce, types, {"BLOCK": _REDUCE}, bandwidth_bound=True, divisible=divisible)
    return [*made, reduce]
