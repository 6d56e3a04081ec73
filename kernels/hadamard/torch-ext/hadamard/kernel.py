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

Memory is the bound: one read, one write. At n = 4096 in bfloat16 the two products are 384 operations an element, which
is 290 TFLOP/s at 3 TB/s, and the turns move 8 bytes an element through shared memory. Bases above 128 are cut into
blocks of 64, re-read the input from L2, and are bound by the products (m operations an element and block of 64).

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
_LARGEST = 8  # blocks of a vector that registers hold (the eighth spills)


class _Plan(NamedTuple):
    """How a length is cut: n = T * A * K."""

    M: int  # order of the base
    K: int  # the base doubled until it fills a block
    KP: int  # rows of a block: K rounded up to 64 or 128, or 64 at a time
    CHUNKS: int  # blocks along K; above 1 each program makes one of them
    A: int
    T: int
    warps: int


def _plan(n: int, m: int) -> _Plan | None:
    """None where the vector does not fit in registers."""
    k = m
    while n % (2 * k) == 0 and 2 * k <= 64:
        k *= 2
    a = min(_COLUMNS, n // k)
    t = n // (k * a)
    if t > 1 and 2 * k <= 128:  # a wider first product costs less than more butterflies and barriers
        k, t = 2 * k, t // 2
    if t > _LARGEST:
        return None
    if k > 128:
        return _Plan(m, k, 64, triton.cdiv(k, 64), a, t, 4 if t <= 2 else 8)
    rows = 64 if k <= 64 else 128
    # At most 128 sums a thread, and no more warps than the rows of a block can be dealt to.
    return _Plan(m, k, rows, 1, a, t, 16 if t > 4 else rows // 16)


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


@triton.jit(do_not_specialize=["rows", "stride_0", "stride_1"])
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
    M: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    CHUNKS: tl.constexpr,
    A: tl.constexpr,
    T: tl.constexpr,
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
    out = tl.arange(0, KP) + tl.program_id(1) * KP
    same = (column // A)[:, None] == (column // A)[None, :]
    right = tl.where(same, _sylvester(run[:, None], run[None, :]).to(tl.float32), 0.0).to(DOT_2)

    loaded = ()
    if CHUNKS == 1:
        left = _base_block(base_ptr, stride_0, stride_1, out, out, M, K, DOT)
        for t in tl.static_range(T):  # all loads are under way before the first product waits
            pos = (t * A + run)[:, None] * K + out[None, :]
            loaded += (tl.load(x_row + pos, (out < K)[None, :] & (pos < n_in) & here, 0.0),)  # type: ignore[assignment]
    made = ()
    for t in tl.static_range(T):
        y = tl.zeros((KP, COLUMNS), tl.float32)
        if CHUNKS == 1:
            pos = (t * A + run)[:, None] * K + out[None, :]
            x = _multiplied(loaded[t], before_ptr, pos, (out < K)[None, :] & (pos < n_in))
            y = _left_product(left, x, y, PARTS, DOT)
        else:
            for chunk in range(CHUNKS):
                inner = tl.arange(0, KP) + chunk * KP
                left = _base_block(base_ptr, stride_0, stride_1, out, inner, M, K, DOT)
                pos = (t * A + run)[:, None] * K + inner[None, :]
                mask = (inner < K)[None, :] & (pos < n_in)
                x = _multiplied(tl.load(x_row + pos, mask & here, 0.0), before_ptr, pos, mask)
                y = _left_product(left, x, y, PARTS, DOT)
        made += (tl.trans(_right_product(y, right, PARTS_2, DOT_2)),)  # type: ignore[assignment]

    for t in tl.static_range(T):
        z = made[0]  # type: ignore[misc]
        for s in tl.static_range(1, T):
            if ((s & t) ^ ((s & t) >> 1) ^ ((s & t) >> 2)) & 1:
                z = z - made[s]
            else:
                z = z + made[s]
        z *= scale
        pos = (t * A + run)[:, None] * K + out[None, :]
        mask = (out < K)[None, :] & (pos < n_out)
        if after_ptr is not None:
            z *= tl.load(after_ptr + pos, mask, 0).to(tl.float32)
        tl.store(y_ptr + row[:, None] * n_out + pos, z, mask & here)


def _constants(plan: _Plan, dtype: torch.dtype, exact: bool) -> dict[str, Any]:
    """The kernel's constants for inputs of a dtype; `exact`: what multiplies them are signs, or nothing."""
    single = dtype == torch.float32
    parts = 3 if single else 1 if exact else 2
    first = tl.float16 if dtype == torch.float16 and exact else tl.bfloat16
    # The interpreter multiplies what bfloat16 holds as float32.
    dots = {"DOT": tl.float32, "DOT_2": tl.float32} if INTERPRETED else {"DOT": first, "DOT_2": tl.bfloat16}
    sizes = {name: value for name, value in plan._asdict().items() if name != "warps"}
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
    plan = _plan(length, 1 if base is None else len(base))
    if plan is None:
        return reference.hadamard(x, base, before, after, scale, transpose, length, out_length)
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, n_in = x.shape
    y = torch.empty(rows, out_length, dtype=x.dtype, device=x.device)
    strides = (0, 0) if base is None else base.stride()
    first, second = reversed(strides) if transpose else strides
    constants = _constants(plan, x.dtype, before is None or before.dtype == torch.int8)
    vectors = [v if v is None else v.contiguous() for v in (before, after)]
    if rows:
        _hadamard[(triton.cdiv(rows, _COLUMNS // plan.A), plan.CHUNKS)](
            x, base, *vectors, y, rows, n_in, out_length, x.stride(0), first, second, scale / math.sqrt(length),
            **constants, num_warps=plan.warps,
        )  # fmt: skip
    return y


# What the sides of a layer give: label, before, after.
_SIDES = (("input", "*i8", None), ("output", None, "*fp32"), ("tuned", "*fp32", None))
# Length, order of the base, sides, dtype, and whether no target may spill. On sm_80 float32 does, and the tuned side
# under Triton 3.6 (72 bytes).
_SIZES = (
    (4096, 1, _SIDES[:2], torch.bfloat16, True),
    (4096, 1, _SIDES[2:], torch.bfloat16, False),
    (4096, 1, _SIDES[:1], torch.float16, True),
    (4096, 1, _SIDES[:1], torch.float32, False),
    (8192, 1, _SIDES[1:2], torch.bfloat16, True),
    (14336, 28, _SIDES[:1], torch.bfloat16, False),
    (28672, 28, _SIDES[1:2], torch.bfloat16, False),
    (11008, 172, _SIDES[:1], torch.bfloat16, False),
)
_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def variants() -> list[Variant]:
    """Every compilation that a launch may ask for, at the sizes of common models."""
    made = []
    for n, m, sides, dtype, bound in _SIZES:
        plan = _plan(n, m)
        if plan is None:
            continue
        for side, before, after in sides:
            signature = {"x_ptr": _TYPES[dtype], "y_ptr": _TYPES[dtype], "rows": "i32", "scale": "fp32"}
            signature |= dict.fromkeys(("n_in", "n_out", "x_stride", "stride_0", "stride_1"), "i32")
            constants = _constants(plan, dtype, before != "*fp32")
            for name, kind in (("base_ptr", "*i8" if m > 1 else None), ("before_ptr", before), ("after_ptr", after)):
                if kind is None:
                    constants[name] = None
                else:
                    signature[name] = kind
            divisible = [s for s in signature if s.endswith("_ptr") or s in ("n_in", "n_out", "x_stride")]
            label = f"{side} {n} {_TYPES[dtype][1:]}"
            made.append(
                Variant(
                    label,
                    _hadamard,
                    signature,
                    constants,
                    plan.warps,
                    matrix=True,
                    bandwidth_bound=bound,
                    divisible=divisible,
                )
            )
    return made
