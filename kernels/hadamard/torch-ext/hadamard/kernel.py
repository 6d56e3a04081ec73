"""The Triton code. Imported on the first launch only.

Every factor of H is a small matrix of +1 and -1, which every 16-bit format holds exactly, so tensor cores multiply
with it at no loss: where the other factor is float32, it is cut into bfloat16 parts that are multiplied one by one and
summed in float32. Two parts (16 bits) are kept where the result is rounded to a half precision, and three (24 bits)
for float32. Activations in a half precision, signs flipped or not, are one part.

A vector is `T * A` runs of `K = 2^i m` elements. With X its (A, K) block number t, the program computes
`Z_t^T = (B X^T) S` for every t, B of order K and S = Sylvester(A), and then the butterflies between the Z_t, which are
whole tensors in registers. The result of the first product is the left operand of the second as it lies in registers,
so the only trips through shared memory are those that turn X and Z around. Where A < 64, 64 / A vectors share a program
and S is block diagonal: the products always have 64 columns.

NVIDIA's cards other than Hopper and data-centre Blackwell take the operands of their products from registers, which
leaves room for one block. There, and where x is more than one part or T above 4, each of a vector's T blocks is made by
a program of its own: it reads the whole vector, mostly from L2, and takes the butterflies first.

Memory is the bound: one read, one write. At n = 4096 in bfloat16 the two products are 384 operations an element, which
is 290 TFLOP/s at 3 TB/s, and the turns move 8 bytes an element through shared memory. Bases above 64 are cut into
blocks of 64 or 32, re-read the input from L2, and are bound by the products (m operations an element and block).

There is nothing to tune: the length sets the blocks, and the registers set the warps.

Shape legend: r rows, n length of the transform, m order of the base.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from ._launch import INTERPRETED, Variant

_COLUMNS = 64  # of both products: runs of one block, or of several vectors
_LARGEST = 4  # blocks of a vector that registers hold
_MOST_READS = 16  # of a vector whose blocks have a program each


class _Plan(NamedTuple):
    """How a length is cut: n = T * A * K."""

    M: int  # order of the base
    K: int  # the base doubled until it fills a block
    KP: int  # rows of a block: K rounded up to 64 or 128, or 64 or 32 at a time
    CHUNKS: int  # blocks along K; above 1 each program makes one of them
    A: int
    T: int
    SPREAD: bool  # each of the T blocks has a program of its own
    warps: int


def _plan(n: int, m: int, exact: bool = True, roomy: bool = True) -> _Plan | None:
    """None where a vector would be read too often. `exact` and `roomy`: as `_exact` and `_roomy` say."""
    k = m
    while n % (2 * k) == 0 and 2 * k <= 64:
        k *= 2
    a = min(_COLUMNS, n // k)
    t = n // (k * a)
    wide = t > 1 and 2 * k <= 128  # a wider first product costs less than more butterflies and barriers
    spread = not (exact and roomy) or (t // 2 if wide else t) > _LARGEST
    if wide and not spread:
        k, t = 2 * k, t // 2
    if t > _MOST_READS:
        return None
    if m > 64 or not (exact or roomy or t > 1):  # one block in parts, whose products leave no room for 64 rows
        rows = 64 if exact and not (spread and t > 1) else 32
        return _Plan(m, k, rows, triton.cdiv(k, rows), a, t, spread, 4 if spread or t <= 2 else 8)
    rows = 64 if k <= 64 else 128
    return _Plan(m, k, rows, 1, a, t, spread, rows // 16)  # no more warps than the rows can be dealt to


def _roomy(capability: tuple[int, int] | None) -> bool:
    """Whether a card by NVIDIA of a compute capability, or by AMD (None), holds more than one block a program."""
    return capability is None or capability[0] in (9, 10)


def _capability(device: torch.device) -> tuple[int, int] | None:
    """None under the interpreter too."""
    return None if device.type != "cuda" or torch.version.hip else torch.cuda.get_device_capability(device)


def _exact(dtype: torch.dtype, real: bool) -> bool:
    """Whether one part holds the first product's operand; `real`: the input is multiplied by more than signs."""
    return dtype != torch.float32 and not real


@triton.jit
def _sylvester(i, j):
    """+1 or -1: the entry (i, j), below 256, of Sylvester's matrix."""
    v = i & j
    v ^= v >> 4
    v ^= v >> 2
    v ^= v >> 1
    return 1 - 2 * (v & 1)


@triton.jit
def _flip(x, sign):
    """x with its sign bit flipped where the int8 `sign` is negative: exact in every dtype."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True) ^ ((sign.to(tl.int32) >> 31) << 31)
    else:
        bits = x.to(tl.int16, bitcast=True) ^ ((sign.to(tl.int16) >> 15) << 15)
    return bits.to(x.dtype, bitcast=True)


@triton.jit
def _base_block(base_ptr, stride_0, stride_1, out, inner, M: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr):
    """Entries (out, inner) of Sylvester(K / M) (x) base, zero from K on."""
    known = (out < K)[:, None] & (inner < K)[None, :]
    entry = _sylvester((out // M)[:, None], (inner // M)[None, :]).to(tl.float32)
    if M > 1:
        entry *= tl.load(base_ptr + (out % M)[:, None] * stride_0 + (inner % M)[None, :] * stride_1, known, 0)
    return tl.where(known, entry, 0.0).to(DOT)


@triton.jit
def _left_product(matrix, x, total, PARTS: tl.constexpr, DOT: tl.constexpr):
    """total + matrix x^T, x in so many bfloat16 parts; one part says that x is exact as it is."""
    if PARTS == 1:
        total = tl.dot(matrix, tl.trans(x.to(DOT)), total)
    else:
        rest = x.to(tl.float32)
        for _ in tl.static_range(PARTS):
            part = rest.to(tl.bfloat16)
            total = tl.dot(matrix, tl.trans(part.to(DOT)), total)
            rest -= part.to(tl.float32)
    return total


@triton.jit
def _right_product(y, matrix, PARTS: tl.constexpr, DOT: tl.constexpr):
    """y matrix, the float32 y in so many bfloat16 parts."""
    rest = y
    total = tl.zeros((y.shape[0], matrix.shape[1]), tl.float32)
    for _ in tl.static_range(PARTS):
        part = rest.to(tl.bfloat16)
        total = tl.dot(part.to(DOT), matrix, total)
        rest -= part.to(tl.float32)
    return total


@triton.jit
def _multiplied(x, before_ptr, pos, mask):
    if before_ptr is not None:
        factor = tl.load(before_ptr + pos, mask, 0)
        if before_ptr.dtype.element_ty == tl.int8:
            x = _flip(x, factor)
        else:
            x = x.to(tl.float32) * factor
    return x


@triton.jit
def _butterfly(
    x_row, before_ptr, run, inner, here, block, blocks, n_in, K: tl.constexpr, A: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """Row `block` of Sylvester(blocks) times the blocks (A, K) of a vector; in float32 where there are several."""
    pos = run[:, None] * K + inner[None, :]
    mask = (inner < K)[None, :]
    total = _multiplied(tl.load(x_row + pos, mask & (pos < n_in) & here, 0.0), before_ptr, pos, mask & (pos < n_in))
    if T > 1:
        total = total.to(tl.float32)
        for t in tl.range(1, blocks, num_stages=2):
            pos += A * K
            inside = mask & (pos < n_in)
            x = _multiplied(tl.load(x_row + pos, inside & here, 0.0), before_ptr, pos, inside).to(tl.float32)
            total += x * _sylvester(block, t).to(tl.float32)
    return total


@triton.jit
def _store(
    z, y_ptr, after_ptr, row, here, run, out, t, n_out, scale, K: tl.constexpr, A: tl.constexpr
):  # fmt: skip
    """Writes block t (A, K) of the result."""
    z *= scale
    pos = (t * A + run)[:, None] * K + out[None, :]
    mask = (out < K)[None, :] & (pos < n_out)
    if after_ptr is not None:
        z *= tl.load(after_ptr + pos, mask, 0).to(tl.float32)
    tl.store(y_ptr + row[:, None] * n_out + pos, z, mask & here)


@triton.jit(do_not_specialize=["rows", "stride_0", "stride_1", "blocks", "chunks"])
def _hadamard(
    x_ptr,
    base_ptr,
    before_ptr,
    after_ptr,
    y_ptr,
    rows,
    n_in,
    n_out,
    x_stride,
    stride_0,
    stride_1,
    scale,
    blocks,
    chunks,
    M: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    CHUNKS: tl.constexpr,
    A: tl.constexpr,
    T: tl.constexpr,
    SPREAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_2: tl.constexpr,
    DOT: tl.constexpr,
    DOT_2: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    run = column % A
    row = tl.program_id(0).to(tl.int64) * (COLUMNS // A) + column // A
    here = (row < rows)[:, None]
    x_row = x_ptr + row[:, None] * x_stride
    out = tl.arange(0, KP) + tl.program_id(1) % chunks * KP
    block = tl.program_id(1) // chunks
    same = (column // A)[:, None] == (column // A)[None, :]
    right = tl.where(same, _sylvester(run[:, None], run[None, :]).to(tl.float32), 0.0).to(DOT_2)

    loaded = ()
    if CHUNKS == 1:
        left = _base_block(base_ptr, stride_0, stride_1, out, out, M, K, DOT)
        if not SPREAD:
            for t in tl.static_range(T):  # all loads are under way before the first product waits
                pos = (t * A + run)[:, None] * K + out[None, :]
                mask = (out < K)[None, :] & (pos < n_in) & here
                loaded += (tl.load(x_row + pos, mask, 0.0),)  # type: ignore[assignment]
    made = ()
    for t in tl.static_range(1 if SPREAD else T):
        y = tl.zeros((KP, COLUMNS), tl.float32)
        if CHUNKS > 1:
            for chunk in tl.range(0, chunks, num_stages=1):  # more under way would spill
                inner = tl.arange(0, KP) + chunk * KP
                left = _base_block(base_ptr, stride_0, stride_1, out, inner, M, K, DOT)
                if SPREAD:
                    x = _butterfly(x_row, before_ptr, run, inner, here, block, blocks, n_in, K, A, T)
                else:
                    pos = (t * A + run)[:, None] * K + inner[None, :]
                    mask = (inner < K)[None, :] & (pos < n_in)
                    x = _multiplied(tl.load(x_row + pos, mask & here, 0.0), before_ptr, pos, mask)
                y = _left_product(left, x, y, PARTS, DOT)
        elif SPREAD:
            x = _butterfly(x_row, before_ptr, run, out, here, block, blocks, n_in, K, A, T)
            y = _left_product(left, x, y, PARTS, DOT)
        else:
            pos = (t * A + run)[:, None] * K + out[None, :]
            x = _multiplied(loaded[t], before_ptr, pos, (out < K)[None, :] & (pos < n_in))
            y = _left_product(left, x, y, PARTS, DOT)
        made += (tl.trans(_right_product(y, right, PARTS_2, DOT_2)),)  # type: ignore[assignment]

    if SPREAD:
        _store(made[0], y_ptr, after_ptr, row, here, run, out, block, n_out, scale, K, A)  # type: ignore[misc]
    else:
        for t in tl.static_range(T):
            z = made[0]  # type: ignore[misc]
            for s in tl.static_range(1, T):
                if ((s & t) ^ ((s & t) >> 1) ^ ((s & t) >> 2)) & 1:
                    z = z - made[s]
                else:
                    z = z + made[s]
            _store(z, y_ptr, after_ptr, row, here, run, out, t, n_out, scale, K, A)


def _constants(plan: _Plan, dtype: torch.dtype, exact: bool) -> dict[str, Any]:
    """The kernel's constants for inputs of a dtype."""
    single = dtype == torch.float32
    exact = exact and not (plan.SPREAD and plan.T > 1)
    parts = 3 if single else 1 if exact else 2
    first = tl.float16 if dtype == torch.float16 and exact else tl.bfloat16
    # The interpreter multiplies what bfloat16 holds as float32.
    dots = {"DOT": tl.float32, "DOT_2": tl.float32} if INTERPRETED else {"DOT": first, "DOT_2": tl.bfloat16}
    sizes = {name: value for name, value in plan._asdict().items() if name != "warps"}
    # Loops count at run time, which keeps compilers from unrolling them: one code for several chunks, and for several
    # blocks that have a program each.
    sizes |= {"CHUNKS": min(plan.CHUNKS, 2)} | ({"T": min(plan.T, 2)} if plan.SPREAD else {})
    return sizes | {"COLUMNS": _COLUMNS, "PARTS": parts, "PARTS_2": 3 if single else 2} | dots


def hadamard(
    x: Tensor,
    base: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    scale: float,
    transpose: bool,
    length: int,
    out_length: int,
) -> Tensor:
    """As in `reference.py`, which also serves vectors that are too long for the registers of one program."""
    exact = _exact(x.dtype, before is not None and before.dtype == torch.float32)
    plan = _plan(length, 1 if base is None else len(base), exact, _roomy(_capability(x.device)))
    if plan is None:
        return reference.hadamard(x, base, before, after, scale, transpose, length, out_length)
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, n_in = x.shape
    y = torch.empty(rows, out_length, dtype=x.dtype, device=x.device)
    strides = (0, 0) if base is None else base.stride()
    first, second = reversed(strides) if transpose else strides
    constants = _constants(plan, x.dtype, exact)
    vectors = [v if v is None else v.contiguous() for v in (before, after)]
    if rows:
        _hadamard[(triton.cdiv(rows, _COLUMNS // plan.A), plan.CHUNKS * (plan.T if plan.SPREAD else 1))](
            x, base, *vectors, y, rows, n_in, out_length, x.stride(0), first, second, scale / math.sqrt(length),
            plan.T, plan.CHUNKS, **constants, num_warps=plan.warps,
        )  # fmt: skip
    return y


# What the sides of a layer give: label, before, after.
_SIDES = (("input", "*i8", None), ("output", None, "*fp32"), ("tuned", "*fp32", None))
# Length and order of the base, for each way to cut a vector: a block of 64 rows, two and four of 128, bases above 64
# in one block and in two. A base of order 1 drops loads from what others do.
_CUTS = ((4096, 1), (14336, 28), (28672, 28), (11008, 172), (8704, 68))
_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# Cards by what `_roomy` says of them.
_CARDS = ((None, ("sm_90", "gfx942")), ((8, 0), ("sm_80",)))


def variants() -> list[Variant]:
    """Every cut of a vector and everything that multiplies one; float16 differs by its products' type alone.

    Lengths of one cut differ in K and A, numbers in addresses and masks, and above 65536 in the blocks' number alone.
    """
    made: dict[tuple[Any, ...], Variant] = {}
    for n, m in _CUTS:
        kinds = [(torch.bfloat16, side) for side in _SIDES] + [(torch.float32, side) for side in _SIDES[1:]]
        for dtype, side in [*kinds, (torch.float16, _SIDES[0])] if n == 4096 else kinds:
            exact = _exact(dtype, side[1] == "*fp32")
            for capability, cards in _CARDS:
                plan = _plan(n, m, exact, _roomy(capability))
                if plan is not None:
                    constants = _constants(plan, dtype, exact)
                    variant = _variant(n, plan, constants, side, dtype, cards)
                    made.setdefault((*constants.values(), side, dtype, cards, plan.warps), variant)
    return list(made.values())


def _variant(
    n: int, plan: _Plan, constants: dict[str, Any], side: tuple[str, str | None, str | None], dtype: torch.dtype,
    cards: tuple[str, ...],
) -> Variant:  # fmt: skip
    signature = {"x_ptr": _TYPES[dtype], "y_ptr": _TYPES[dtype], "rows": "i32", "scale": "fp32"}
    signature |= dict.fromkeys(("n_in", "n_out", "x_stride", "stride_0", "stride_1", "blocks", "chunks"), "i32")
    given = {"base_ptr": "*i8" if plan.M > 1 else None, "before_ptr": side[1], "after_ptr": side[2]}
    signature |= {name: kind for name, kind in given.items() if kind is not None}
    divisible = [s for s in signature if s.endswith("_ptr") or s in ("n_in", "n_out", "x_stride")]
    return Variant(
        f"{side[0]} {n} {_TYPES[dtype][1:]}{', spread' * plan.SPREAD}", _hadamard, signature,
        constants | {name: None for name, kind in given.items() if kind is None}, plan.warps, matrix=True,
        bandwidth_bound=plan.M <= 64, divisible=divisible, targets=cards,
    )  # fmt: skip
