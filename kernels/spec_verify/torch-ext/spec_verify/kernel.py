"""The Triton code. Imported on the first launch only.

What bounds it: reading p and q of the one row that the next token is drawn from, 2 v entries a sequence; the tests of
the drafted tokens are a handful of scalar loads. A chain with few sequences is split over programs (one row of 128k
float32 pairs is 1 MB, some 15 us for one multiprocessor and under 2 us for all), which each repeat the tests and sum
their own part of the residual; a second launch, one program a sequence, looks into the one part that holds the token.
With many sequences, or a small v, a program draws by itself and the second launch falls away. A tree must know the
residual's mass before its next test, so that one program walks it, with as many bytes in flight as it can have.

Shape legend: b sequences, k drafted tokens of a chain, n nodes of a tree, m rows of draft distributions, v tokens.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant
from .reference import LEAST, ONE
from .scores import greedy_variants, log_sum_exp, verify_chain_greedy, verify_tree_greedy

__all__ = [
    "variants",
    "verify_chain",
    "verify_chain_greedy",
    "verify_chain_logits",
    "verify_tree",
    "verify_tree_greedy",
]

_ONE = tl.constexpr(ONE)
_LEAST = tl.constexpr(LEAST)
_MULTIPROCESSORS = 132


class _Plan(NamedTuple):
    """How a row of v entries is read: by tiles of (rows, columns), whose rows lie `chunk` entries apart."""

    parts: int  # programs a sequence
    chunk: int
    rows: int
    columns: int
    warps: int


def _whole(v: int) -> _Plan:
    """One program reads all: 16 bytes times 8 in flight a lane, and sums of 64 chunks to find the token by."""
    rows, columns = 64, 128
    return _Plan(1, triton.cdiv(triton.cdiv(v, rows), columns) * columns, rows, columns, 16)


def _plan(b: int, v: int) -> _Plan:
    """Short parts while one wave of programs holds them all, else longer ones; one program where those suffice.

    A rule and no autotuner: sums must not depend on what was measured, or the same uniforms would draw other tokens.
    """
    if v <= 8192 or b >= 2 * _MULTIPROCESSORS:
        return _whole(v)
    columns, warps = (1024, 4) if b * triton.cdiv(v, 1024) <= 16 * _MULTIPROCESSORS else (4096, 8)
    blocks = triton.cdiv(v, columns)
    parts = min(blocks, max(1, 8 * _MULTIPROCESSORS // b)) if columns == 4096 else blocks
    each = triton.cdiv(blocks, parts)
    return _Plan(triton.cdiv(blocks, each), each * columns, 1, columns, warps)


@triton.jit
def _entries(ptr, at, mask, inverse, lse, LOGITS: tl.constexpr):
    """Probabilities in float32; those of logits are exp(logit / temperature - lse). 0 where masked."""
    if LOGITS:
        x = tl.exp(tl.load(ptr + at, mask, -float("inf")).to(tl.float32) * inverse - lse)
    else:
        x = tl.load(ptr + at, mask, 0.0).to(tl.float32)
    return x


@triton.jit
def _residual(p, q, scale):
    """As in `reference.py`. Launches forbid a fused multiply-add: all devices round alike."""
    rest = p - scale * q
    return tl.minimum(tl.where(rest > 0, rest, 0.0), 1.0)


@triton.jit
def _weights(p_ptr, q_ptr, at, v, scale, inverse, p_lse, q_lse, LOGITS: tl.constexpr):
    """The residual at some columns, in fixed point. q is not read where the scale is 0."""
    p = _entries(p_ptr, at, at < v, inverse, p_lse, LOGITS)
    q = _entries(q_ptr, at, at < tl.where(scale > 0, v, 0), inverse, q_lse, LOGITS)
    return (_residual(p, q, scale) * _ONE).to(tl.int64)


@triton.jit
def _sums(
    p_ptr, q_ptr, first, chunk, v, scale, inverse, p_lse, q_lse,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """(ROWS,) sums of weights of neighbouring chunks from `first` on. Nothing is reduced across lanes in the loop."""
    at = first + tl.arange(0, ROWS)[:, None] * chunk + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.int64)
    for offset in range(0, chunk, COLUMNS):
        total += _weights(p_ptr, q_ptr, at + offset, v, scale, inverse, p_lse, q_lse, LOGITS)
    return tl.sum(total, 1)


@triton.jit
def _draw(
    p_ptr, q_ptr, u, sums, chunk, v, scale, inverse, p_lse, q_lse, BLOCK: tl.constexpr, LOGITS: tl.constexpr
):  # fmt: skip
    """The token at which the running sum passes u times the total, given the chunks' sums."""
    total = tl.sum(sums, 0)
    held = total > 0
    scale = tl.where(held, scale, 0.0)
    if total == 0:  # p and q are equal but for rounding: draw from p
        length = tl.cdiv(v, BLOCK) * BLOCK
        total = tl.sum(_sums(p_ptr, q_ptr, 0, length, v, scale, inverse, p_lse, q_lse, 1, BLOCK, LOGITS), 0)
    threshold = (u.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    threshold = tl.maximum(tl.minimum(threshold, total - 1), 0)
    passed = tl.cumsum(sums, 0) <= threshold
    start = tl.multiple_of(tl.where(held, tl.sum(passed.to(tl.int32), 0) * chunk, 0), 128)
    stop = tl.where(held, start + chunk, v)
    below = tl.sum(tl.where(passed, sums, 0), 0)
    token = v
    for offset in range(start, stop, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        weights = _weights(p_ptr, q_ptr, at, v, scale, inverse, p_lse, q_lse, LOGITS)
        upto = below + tl.cumsum(weights, 0)
        token = tl.minimum(token, tl.min(tl.where(upto > threshold, at, v), 0))
        below += tl.sum(weights, 0)
    return tl.where(token < v, token, -1).to(tl.int64)


@triton.jit
def _lse(ptr, rows, mask, parts, PARTS: tl.constexpr):
    """log-sum-exp of rows (ROWS,), from those of their parts."""
    part = tl.arange(0, PARTS)[None, :]
    x = tl.load(ptr + rows[:, None] * parts + part, mask[:, None] & (part < parts), -float("inf"))
    top = tl.max(x, 1)
    base = tl.where(top == -float("inf"), 0.0, top)  # -inf less -inf is NaN
    return base + tl.log(tl.sum(tl.exp(x - base[:, None]), 1))


@triton.jit
def _chain(
    token_ptr, q_ptr, p_ptr, u_ptr, length_ptr, q_lse_ptr, p_lse_ptr, accepted_ptr, next_ptr, sum_ptr, picked_ptr,
    k, v, q_row, q_step, p_row, p_step, chunk, inverse, lse_parts,
    STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LSE_PARTS: tl.constexpr, LOGITS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    row, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    wide = row.to(tl.int64)
    q_ptr += wide * q_row
    p_ptr += wide * p_row
    step = tl.arange(0, STEPS)
    count = k
    if length_ptr is not None:
        count = tl.minimum(tl.load(length_ptr + row), k).to(tl.int32)
    token = tl.load(token_ptr + row * k + step, step < count, -1).to(tl.int64)
    known = (token >= 0) & (token < v)
    count = tl.min(tl.where(known, STEPS, step), 0)  # step k holds no token
    known = step < count
    q_lse, p_lse = step * 0.0, step * 0.0
    if LOGITS:
        q_lse = _lse(q_lse_ptr, row * k + step, step < count, lse_parts, LSE_PARTS)
        p_lse = _lse(p_lse_ptr, row * (k + 1) + step, step <= count, lse_parts, LSE_PARTS)
    wide_step = step.to(tl.int64)
    q = _entries(q_ptr, wide_step * q_step + token, known, inverse, q_lse, LOGITS)
    p = _entries(p_ptr, wide_step * p_step + token, known, inverse, p_lse, LOGITS)
    u = tl.load(u_ptr + row * (k + 1) + step, step < count, 1.0)
    # The product of two float32 is exact in float64.
    passed = known & (u.to(tl.float64) * q.to(tl.float64) < p.to(tl.float64))
    accepted = tl.min(tl.where(passed | (step >= count), count, step), 0)
    scale = tl.where(accepted < count, 1.0, 0.0)
    q_ptr += accepted.to(tl.int64) * q_step
    p_ptr += accepted.to(tl.int64) * p_step
    q_at = tl.sum(tl.where((step == accepted) & (step < count), q_lse, 0.0), 0)
    p_at = tl.sum(tl.where(step == accepted, p_lse, 0.0), 0)
    if part == 0:
        tl.store(accepted_ptr + row, accepted.to(tl.int64))
    sums = _sums(p_ptr, q_ptr, part * chunk, chunk, v, scale, inverse, p_at, q_at, ROWS, COLUMNS, LOGITS)
    if WHOLE:
        last = tl.load(u_ptr + row * (k + 1) + k)
        tl.store(next_ptr + row, _draw(p_ptr, q_ptr, last, sums, chunk, v, scale, inverse, p_at, q_at, 1024, LOGITS))
    else:
        tl.store(sum_ptr + row * parts + part, tl.sum(sums, 0))
        if part == 0:
            tl.store(picked_ptr + 3 * row, scale)
            tl.store(picked_ptr + 3 * row + 1, p_at)
            tl.store(picked_ptr + 3 * row + 2, q_at)


@triton.jit
def _pick(
    q_ptr, p_ptr, u_ptr, accepted_ptr, sum_ptr, picked_ptr, next_ptr,
    k, v, q_row, q_step, p_row, p_step, chunk, parts, inverse,
    PARTS: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    accepted = tl.load(accepted_ptr + row)
    scale = tl.load(picked_ptr + 3 * row)
    p_lse = tl.load(picked_ptr + 3 * row + 1)
    q_lse = tl.load(picked_ptr + 3 * row + 2)
    part = tl.arange(0, PARTS)
    sums = tl.load(sum_ptr + row * parts + part, part < parts, 0)
    p_ptr += wide * p_row + accepted * p_step
    q_ptr += wide * q_row + accepted * q_step
    u = tl.load(u_ptr + row * (k + 1) + k)
    tl.store(next_ptr + row, _draw(p_ptr, q_ptr, u, sums, chunk, v, scale, inverse, p_lse, q_lse, 1024, LOGITS))


@triton.jit
def _tree(
    token_ptr, parent_ptr, q_ptr, p_ptr, u_ptr, length_ptr, path_ptr, number_ptr, next_ptr,
    n, m, v, q_row, q_step, p_row, p_step, chunk, max_depth,
    NODES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REPLACEMENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    q_root, p_root = q_ptr + wide * q_row, p_ptr + wide * p_row
    token_ptr += wide * n
    u_ptr += wide * (n + 1)
    path_ptr += wide * max_depth
    count = n
    if length_ptr is not None:
        count = tl.minimum(tl.load(length_ptr + row), n).to(tl.int32)
    index = tl.arange(0, NODES)
    parent = tl.load(parent_ptr + wide * n + index, index < count, -2).to(tl.int32)
    tokens = tl.load(token_ptr + index, index < count, -1).to(tl.int64)
    parent = tl.where((tokens >= 0) & (tokens < v), parent, -2)
    row_of = tl.zeros((), tl.int32)  # of the distributions: 1 + the node where the path ends, 0 for the root
    depth = tl.zeros((), tl.int32)
    zero = tl.zeros((), tl.float64)
    scale, mass, left = zero, zero + 1, zero + 1
    sums = tl.zeros((ROWS,), tl.int64)
    child = tl.min(tl.where((parent == -1) & (m > 0) & (max_depth > 0), index, NODES), 0)
    while child < NODES:
        token = tl.load(token_ptr + child).to(tl.int64)
        p_at, q_at = p_root + row_of.to(tl.int64) * p_step, q_root + row_of.to(tl.int64) * q_step
        p, q = tl.load(p_at + token).to(tl.float32), tl.load(q_at + token).to(tl.float32)
        u = tl.load(u_ptr + child)
        rest = _residual(p, q, scale.to(tl.float32)).to(tl.float64)
        if u.to(tl.float64) * q.to(tl.float64) * mass < rest * left:
            tl.store(path_ptr + depth, child.to(tl.int64))
            row_of = child + 1
            depth += 1
            scale, mass, left = zero, zero + 1, zero + 1
        else:
            scale += mass / left
            sums = _sums(p_at, q_at, 0, chunk, v, scale.to(tl.float32), 1.0, 0.0, 0.0, ROWS, COLUMNS, False)
            mass = tl.sum(sums, 0).to(tl.float64) / _ONE
            if not REPLACEMENT:
                left -= q.to(tl.float64)
        more = tl.where((row_of < m) & (depth < max_depth) & (mass > 0) & (left > _LEAST), count, 0)
        child = tl.min(tl.where((parent == row_of - 1) & (index > child) & (index < more), index, NODES), 0)
    p_at, q_at = p_root + row_of.to(tl.int64) * p_step, q_root + row_of.to(tl.int64) * q_step
    final = scale.to(tl.float32)
    if scale == 0:
        sums = _sums(p_at, q_at, 0, chunk, v, final, 1.0, 0.0, 0.0, ROWS, COLUMNS, False)
    token = _draw(p_at, q_at, tl.load(u_ptr + n), sums, chunk, v, final, 1.0, 0.0, 0.0, 1024, False)
    tl.store(next_ptr + row, token)
    tl.store(number_ptr + row, depth.to(tl.int64))
    for at in range(depth, max_depth):
        tl.store(path_ptr + at, tl.full((), -1, tl.int64))


def _rows_dense(x: Tensor) -> Tensor:
    """x, copied only where the entries of its rows lie apart."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _integers(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=like.device)


def _launch_chain(
    tokens: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor, lengths: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None, inverse: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`statistics`: log-sum-exp of the parts of all rows of draft and target, where these are logits."""
    b, k = tokens.shape
    v = target.shape[2]
    accepted, following = _integers((b,), tokens), _integers((b,), tokens)
    if b == 0:
        return accepted, following
    tokens, uniforms = tokens.contiguous(), uniforms.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    plan = _plan(b, v)
    whole, logits = plan.parts == 1, statistics is not None
    sums = None if whole else _integers((b, plan.parts), tokens)
    picked = None if whole else torch.empty(b, 3, dtype=torch.float32, device=tokens.device)
    q_lse, p_lse = statistics or (None, None)
    strides = *draft.stride()[:2], *target.stride()[:2]
    parts = 1 if p_lse is None else p_lse.shape[1]
    _chain[(b, plan.parts)](
        tokens, draft, target, uniforms, lengths, q_lse, p_lse, accepted, following, sums, picked,
        k, v, *strides, plan.chunk, inverse, parts, triton.next_power_of_2(k + 1), plan.rows, plan.columns,
        triton.next_power_of_2(parts), logits, whole, num_warps=plan.warps, enable_fp_fusion=False,
    )  # fmt: skip
    if not whole:
        _pick[(b,)](
            draft, target, uniforms, accepted, sums, picked, following, k, v, *strides, plan.chunk,
            plan.parts, inverse, triton.next_power_of_2(plan.parts), logits, enable_fp_fusion=False,
        )  # fmt: skip
    return accepted, following


def verify_chain(
    tokens: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As in `reference.py`."""
    return _launch_chain(tokens, _rows_dense(draft), _rows_dense(target), uniforms, lengths, None, 1.0)


def verify_chain_logits(
    tokens: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor, lengths: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """As in `reference.py`. Two launches more, for the normalisers: no probability is written."""
    draft, target = _rows_dense(draft), _rows_dense(target)
    inverse = 1 / temperature
    statistics = log_sum_exp(draft, target, inverse)
    return _launch_chain(tokens, draft, target, uniforms, lengths, statistics, inverse)


def verify_tree(
    tokens: Tensor, parents: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor, lengths: Tensor | None,
    replacement: bool, max_depth: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As in `reference.py`."""
    b, n = tokens.shape
    v = target.shape[2]
    path, number, following = _integers((b, max_depth), tokens), _integers((b,), tokens), _integers((b,), tokens)
    if b == 0:
        return path, number, following
    draft, target = _rows_dense(draft), _rows_dense(target)
    plan = _whole(v)
    _tree[(b,)](
        tokens.contiguous(), parents.contiguous(), draft, target, uniforms.contiguous(),
        None if lengths is None else lengths.contiguous(), path, number, following,
        n, draft.shape[1], v, *draft.stride()[:2], *target.stride()[:2], plan.chunk, max_depth,
        triton.next_power_of_2(max(1, n)), plan.rows, plan.columns, replacement,
        num_warps=plan.warps, enable_fp_fusion=False,
    )  # fmt: skip
    return path, number, following


def variants() -> list[Variant]:
    """Every compilation that a launch may ask for: bfloat16 and float32 probabilities, and logits of bfloat16."""
    return [*_chain_variants(), *_tree_variants(), *greedy_variants()]


def _signature(kind: str, pointers: str, integers: str, **others: str) -> dict[str, str]:
    """Types by name: `kind` for p and q, int64 for the other pointers."""
    typed = {name: kind if name in ("p_ptr", "q_ptr") else "*i64" for name in pointers.split()}
    return typed | dict.fromkeys(integers.split(), "i32") | others


def _chain_variants() -> list[Variant]:
    strides = "q_row q_step p_row p_step"
    made = []
    for kind, logits in (("*bf16", False), ("*fp32", False), ("*bf16", True)):
        floats = dict.fromkeys(("u_ptr", "q_lse_ptr", "p_lse_ptr", "picked_ptr"), "*fp32") | {"inverse": "fp32"}
        pointers = "token_ptr q_ptr p_ptr length_ptr accepted_ptr next_ptr sum_ptr"
        chain = _signature(kind, pointers, f"k v {strides} chunk lse_parts", **floats)
        pointers = "q_ptr p_ptr accepted_ptr sum_ptr next_ptr"
        pick = _signature(kind, pointers, f"k v {strides} chunk parts", **floats)
        divisible = ["q_ptr", "p_ptr", "v", "chunk", *strides.split()]
        absent: dict[str, Any] = {"length_ptr": None} if logits else {"q_lse_ptr": None, "p_lse_ptr": None}
        name = f"{kind[1:]}{' logits' * logits}"
        for b, v in ((1, 128256), (128, 128256), (264, 128256)):
            plan = _plan(b, v)
            values: dict[str, Any] = {
                "STEPS": 8,
                "ROWS": plan.rows,
                "COLUMNS": plan.columns,
                "LSE_PARTS": 16,
                "LOGITS": logits,
            }
            values |= absent | {"WHOLE": plan.parts == 1}
            if plan.parts == 1:
                values |= {"sum_ptr": None, "picked_ptr": None}
            label = f"chain {name} {plan.rows} x {plan.columns}"
            made.append(Variant(label, _chain, chain, values, plan.warps, bandwidth_bound=True, divisible=divisible))
        made.append(Variant(f"pick {name}", _pick, pick, {"PARTS": 128, "LOGITS": logits}, divisible=divisible))
    return made


def _tree_variants() -> list[Variant]:
    made = []
    pointers = "token_ptr parent_ptr q_ptr p_ptr length_ptr path_ptr number_ptr next_ptr"
    strides = "q_row q_step p_row p_step"
    divisible = ["q_ptr", "p_ptr", "v", "chunk", *strides.split()]
    for kind in ("*bf16", "*fp32"):
        for replacement in (True, False):
            plan = _whole(128256)
            signature = _signature(kind, pointers, f"n m v {strides} chunk max_depth", u_ptr="*fp32")
            values = {"NODES": 64, "ROWS": plan.rows, "COLUMNS": plan.columns, "REPLACEMENT": replacement}
            label = f"tree {kind[1:]} {'with' if replacement else 'without'} replacement"
            made.append(Variant(label, _tree, signature, values, plan.warps, bandwidth_bound=True, divisible=divisible))
    return made
