"""The Triton code over whole rows of scores: normalisers of logits, and greedy acceptance by the argmax.

All rows of all sequences are read at once, each by a few programs: bound by these bytes. What follows needs a few
numbers a row, and is one program a sequence.

Shape legend: b sequences, k drafted tokens of a chain, n nodes of a tree, v tokens.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant

_COLUMNS = 2048  # 32 bytes of bfloat16 a lane and load
_PROGRAMS = 8 * 132


def _split(rows: int, v: int) -> tuple[int, int]:
    """Parts a row, and their length."""
    blocks = triton.cdiv(v, _COLUMNS)
    each = triton.cdiv(blocks, min(blocks, max(1, _PROGRAMS // rows)))
    return triton.cdiv(blocks, each), each * _COLUMNS


@triton.jit
def _log_sum_exp(x_ptr, out_ptr, steps, v, x_row, x_step, chunk, inverse, COLUMNS: tl.constexpr):
    row, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    x_ptr += (row // steps).to(tl.int64) * x_row + (row % steps).to(tl.int64) * x_step
    at = part * chunk + tl.arange(0, COLUMNS)
    top = tl.full((COLUMNS,), -float("inf"), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for offset in range(0, chunk, COLUMNS):
        x = tl.load(x_ptr + at + offset, at + offset < v, -float("inf")).to(tl.float32) * inverse
        higher = tl.maximum(top, x)
        base = tl.where(higher == -float("inf"), 0.0, higher)  # -inf less -inf is NaN
        total = total * tl.exp(top - base) + tl.exp(x - base)
        top = higher
    highest = tl.max(top, 0)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    tl.store(out_ptr + row * parts + part, base + tl.log(tl.sum(total * tl.exp(top - base), 0)))


def log_sum_exp(draft: Tensor, target: Tensor, inverse: float) -> tuple[Tensor, Tensor]:
    """log-sum-exp of the parts of each row of draft (b, k, v) and target (b, k+1, v), times 1 / temperature.

    Returns:
        (b k, parts) and (b (k+1), parts), float32.
    """
    b, steps, v = target.shape
    parts, chunk = _split(max(1, b * steps), v)
    made = []
    for x in (draft, target):
        rows = x.shape[0] * x.shape[1]
        made.append(torch.empty(rows, parts, dtype=torch.float32, device=x.device))
        if rows:
            _log_sum_exp[(rows, parts)](
                x, made[-1], x.shape[1], v, *x.stride()[:2], chunk, inverse, _COLUMNS, enable_fp_fusion=False
            )
    return made[0], made[1]


@triton.jit
def _argmax(x_ptr, top_ptr, best_ptr, steps, v, x_row, x_step, chunk, COLUMNS: tl.constexpr):
    row, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    x_ptr += (row // steps).to(tl.int64) * x_row + (row % steps).to(tl.int64) * x_step
    at = part * chunk + tl.arange(0, COLUMNS)
    top = tl.full((COLUMNS,), -float("inf"), tl.float32)
    best = at
    for offset in range(0, chunk, COLUMNS):
        x = tl.load(x_ptr + at + offset, at + offset < v, -float("inf")).to(tl.float32)
        higher = x > top  # never for a NaN, and the first of equals stays
        best = tl.where(higher, at + offset, best)
        top = tl.where(higher, x, top)
    highest = tl.max(top, 0)
    tl.store(top_ptr + row * parts + part, highest)
    tl.store(best_ptr + row * parts + part, tl.min(tl.where(top == highest, best, 2147483647), 0))


@triton.jit
def _best(top_ptr, best_ptr, rows, mask, parts, PARTS: tl.constexpr):
    """Argmax of rows (ROWS,), from those of their parts."""
    part = tl.arange(0, PARTS)[None, :]
    mask = mask[:, None] & (part < parts)
    top = tl.load(top_ptr + rows[:, None] * parts + part, mask, -float("inf"))
    best = tl.load(best_ptr + rows[:, None] * parts + part, mask, 2147483647)
    return tl.min(tl.where(top == tl.max(top, 1)[:, None], best, 2147483647), 1)


@triton.jit
def _greedy_chain(
    token_ptr, top_ptr, best_ptr, length_ptr, accepted_ptr, next_ptr, k, parts,
    STEPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    step = tl.arange(0, STEPS)
    count = k
    if length_ptr is not None:
        count = tl.maximum(tl.minimum(tl.load(length_ptr + row), k), 0).to(tl.int32)
    best = _best(top_ptr, best_ptr, row * (k + 1) + step, step <= k, parts, PARTS)
    token = tl.load(token_ptr + row * k + step, step < count, -1)
    accepted = tl.min(tl.where((token == best) | (step >= count), count, step), 0)
    tl.store(accepted_ptr + row, accepted.to(tl.int64))
    tl.store(next_ptr + row, tl.sum(tl.where(step == accepted, best, 0), 0).to(tl.int64))


@triton.jit
def _greedy_tree(
    token_ptr, parent_ptr, top_ptr, best_ptr, length_ptr, path_ptr, number_ptr, next_ptr, n, parts, max_depth,
    NODES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    path_ptr += row.to(tl.int64) * max_depth
    index = tl.arange(0, NODES)  # of the distributions: 1 + a node, 0 for the root
    count = n
    if length_ptr is not None:
        count = tl.maximum(tl.minimum(tl.load(length_ptr + row), n), 0).to(tl.int32)
    best = _best(top_ptr, best_ptr, row * (n + 1) + index, index <= n, parts, PARTS)
    used = (index > 0) & (index <= count)
    token = tl.load(token_ptr + row * n + index - 1, used, -1)
    parent = tl.load(parent_ptr + row * n + index - 1, used, -2).to(tl.int32)
    here = tl.zeros((), tl.int32)
    depth = tl.zeros((), tl.int32)
    wanted = tl.sum(tl.where(index == here, best, 0), 0)
    child = tl.min(tl.where(used & (parent == -1) & (token == wanted), index, NODES), 0)
    while (child < NODES) & (depth < max_depth):
        tl.store(path_ptr + depth, child.to(tl.int64) - 1)
        here = child
        depth += 1
        wanted = tl.sum(tl.where(index == here, best, 0), 0)
        follows = used & (parent == here - 1) & (index > here) & (token == wanted)
        child = tl.min(tl.where(follows, index, NODES), 0)
    tl.store(next_ptr + row, wanted.to(tl.int64))
    tl.store(number_ptr + row, depth.to(tl.int64))
    for at in range(depth, max_depth):
        tl.store(path_ptr + at, tl.full((), -1, tl.int64))


def _argmaxes(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Largest entry and its index, of the parts of each row of scores (b, s, v): both (b s, parts)."""
    if scores.stride(-1) != 1:
        scores = scores.contiguous()
    b, steps, v = scores.shape
    parts, chunk = _split(b * steps, v)
    top = torch.empty(b * steps, parts, dtype=torch.float32, device=scores.device)
    best = torch.empty(b * steps, parts, dtype=torch.int32, device=scores.device)
    _argmax[(b * steps, parts)](
        scores, top, best, steps, v, *scores.stride()[:2], chunk, _COLUMNS, enable_fp_fusion=False
    )
    return top, best


def verify_chain_greedy(tokens: Tensor, target: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """As in `reference.py`."""
    b, k = tokens.shape
    accepted, following = (torch.empty(b, dtype=torch.int64, device=tokens.device) for _ in range(2))
    if b:
        top, best = _argmaxes(target)
        parts = top.shape[1]
        _greedy_chain[(b,)](
            tokens.contiguous(), top, best, None if lengths is None else lengths.contiguous(), accepted, following,
            k, parts, triton.next_power_of_2(k + 1), triton.next_power_of_2(parts), num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return accepted, following


def verify_tree_greedy(
    tokens: Tensor, parents: Tensor, target: Tensor, lengths: Tensor | None, max_depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As in `reference.py`."""
    b, n = tokens.shape
    path = torch.empty(b, max_depth, dtype=torch.int64, device=tokens.device)
    number, following = (torch.empty(b, dtype=torch.int64, device=tokens.device) for _ in range(2))
    if b:
        top, best = _argmaxes(target)
        parts = top.shape[1]
        _greedy_tree[(b,)](
            tokens.contiguous(), parents.contiguous(), top, best, None if lengths is None else lengths.contiguous(),
            path, number, following, n, parts, max_depth, triton.next_power_of_2(n + 1),
            triton.next_power_of_2(parts), enable_fp_fusion=False,
        )  # fmt: skip
    return path, number, following


def greedy_variants() -> list[Variant]:
    """Every compilation that a launch here may ask for."""
    rows = {"x_ptr": "*bf16", "steps": "i32", "v": "i32", "x_row": "i32", "x_step": "i32", "chunk": "i32"}
    divisible = ["x_ptr", "v", "x_row", "x_step", "chunk"]
    made = []
    for kind in ("*bf16", "*fp32"):
        signature = rows | {"x_ptr": kind, "top_ptr": "*fp32", "best_ptr": "*i32"}
        values = {"COLUMNS": _COLUMNS}
        made.append(
            Variant(f"argmax {kind[1:]}", _argmax, signature, values, bandwidth_bound=True, divisible=divisible)
        )
        signature = rows | {"x_ptr": kind, "out_ptr": "*fp32", "inverse": "fp32"}
        label = f"log_sum_exp {kind[1:]}"
        made.append(Variant(label, _log_sum_exp, signature, values, bandwidth_bound=True, divisible=divisible))
    chain = dict.fromkeys(("token_ptr", "length_ptr", "accepted_ptr", "next_ptr"), "*i64")
    chain |= {"top_ptr": "*fp32", "best_ptr": "*i32", "k": "i32", "parts": "i32"}
    made.append(Variant("greedy chain", _greedy_chain, chain, {"STEPS": 8, "PARTS": 64}, num_warps=1))
    tree = dict.fromkeys(("token_ptr", "parent_ptr", "length_ptr", "path_ptr", "number_ptr", "next_ptr"), "*i64")
    tree |= {"top_ptr": "*fp32", "best_ptr": "*i32", "n": "i32", "parts": "i32", "max_depth": "i32"}
    made.append(Variant("greedy tree", _greedy_tree, tree, {"NODES": 128, "PARTS": 16}))
    return made
