"""The Triton code. Imported on the first launch only.

Bound by bandwidth: a cache is read once, 2 n d 16-bit numbers a key-value head or its packed codes, for h / k * t rows
of queries. One program takes those rows of one key-value head over one range of tokens; enough ranges fill the card.
Keys and values are the left operands of the matrix products, tokens and channels their rows, so that the long
side of the tensor cores is filled and the few rows of queries, padded to 16, are the short one. A second kernel joins
the ranges in a fixed order: results are deterministic.

Nothing is tuned: shared memory sets the blocks (`_blocks`), the count of multiprocessors the ranges (`_shared_out`).
A cache grows with each token, and results must not depend on what was measured at some length.

Logits are in base 2. Rows: head in the group * t + query token.
Shape legend: b batch, h query heads, k key-value heads, t query tokens, n cached tokens, d head size.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, Variant
from .tiles import (
    dense_block,
    fold,
    key_block,
    logits_of,
    normaliser_of,
    product,
    query_block,
    rows_of,
    store_range,
    value_block,
)

_CHUNK = 32  # ranges that a program of `_join` takes at a time
_TOKENS = 128  # tokens of a program of `_join` that sums attention
_PER_PROCESSOR = 2  # programs of a pass that one multiprocessor holds, by its shared memory
_DENSE_STAGES, _PACKED_STAGES = 3, 4  # packed blocks are small: more of them must be under way
_RESIDUAL_BLOCKS = 2  # of a range of the residual
# What changes from token to token must not compile anew.
_VARYING = ["n", "last", "splits", "per_split", "mask_batch", "mask_head", "mask_step"]


@triton.jit(do_not_specialize=_VARYING)
def _dense(
    q_ptr, k_ptr, v_ptr, mask_ptr, score_ptr, part_ptr, normaliser_ptr, q_batch, q_head, q_step, k_batch, k_head,
    k_token, v_batch, v_head, v_token, mask_batch, mask_head, mask_step, mask_token, n, last, splits, per_split,
    kv_heads, group, steps, scale, softcap, lowest, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows = group * steps
    row, head, step, index = rows_of(tl.program_id(0), steps, rows, BLOCK_M)
    split, which = index % splits, index // splits
    batch, kv_head = (which // kv_heads).to(tl.int64), (which % kv_heads).to(tl.int64)
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch + kv_head * group * mask_head
    if score_ptr is not None:
        score_ptr += which.to(tl.int64) * n * rows
    query = query_block(q_ptr + batch * q_batch + kv_head * group * q_head, head, step, q_head, q_step, D, BLOCK_D)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    nothing = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(split * per_split, tl.minimum(split * per_split + per_split, n), BLOCK_N):
        key = dense_block(k_ptr, first, n, k_token, D, BLOCK_D, BLOCK_N)
        value = dense_block(v_ptr, first, n, v_token, D, BLOCK_D, BLOCK_N)
        logits = logits_of(
            product(key, query, nothing, WIDE), first + tl.arange(0, BLOCK_N), n, head, step, row, rows, last, scale,
            softcap, mask_ptr, mask_head, mask_step, mask_token, lowest, score_ptr, SOFTCAP,
        )  # fmt: skip
        top, total, sums = fold(logits, value, top, total, sums, WIDE)
    store_range(sums, total, top, index, row, rows, part_ptr, normaliser_ptr, D, BLOCK_D)


@triton.jit(do_not_specialize=[*_VARYING, "packed", "packed_splits"])
def _quantized(
    q_ptr, kc_ptr, kr_ptr, vc_ptr, vr_ptr, rk_ptr, rv_ptr, mask_ptr, score_ptr, part_ptr, normaliser_ptr, q_batch,
    q_head, q_step, kc_batch, kc_head, kc_word, kr_batch, kr_head, kr_part, vc_batch, vc_head, vc_token, vr_batch,
    vr_head, vr_token, rk_batch, rk_head, rk_token, rv_batch, rv_head, rv_token, mask_batch, mask_head, mask_step,
    mask_token, n, packed, last, splits, packed_splits, per_split, kv_heads, group, steps, scale, softcap, lowest,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RESIDUAL: tl.constexpr,
    KEY_BITS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The first `packed` of n tokens are quantized and shared out among `packed_splits`, the others are dense."""
    rows = group * steps
    row, head, step, index = rows_of(tl.program_id(0), steps, rows, BLOCK_M)
    split, which = index % splits, index // splits
    batch, kv_head = (which // kv_heads).to(tl.int64), (which % kv_heads).to(tl.int64)
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch + kv_head * group * mask_head
    if score_ptr is not None:
        score_ptr += which.to(tl.int64) * n * rows
    query = query_block(q_ptr + batch * q_batch + kv_head * group * q_head, head, step, q_head, q_step, D, BLOCK_D)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    nothing = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if split < packed_splits:
        kc_ptr += batch * kc_batch + kv_head * kc_head
        kr_ptr += batch * kr_batch + kv_head * kr_head
        vc_ptr += batch * vc_batch + kv_head * vc_head
        vr_ptr += batch * vr_batch + kv_head * vr_head
        for first in range(split * per_split, tl.minimum(split * per_split + per_split, packed), BLOCK_N):
            key = key_block(kc_ptr, kr_ptr, first, packed, kc_word, kr_part, D, BLOCK_D, BLOCK_N, KEY_BITS, KEY_GROUP)
            value = value_block(
                vc_ptr, vr_ptr, first, packed, vc_token, vr_token, D, BLOCK_D, BLOCK_N, VALUE_BITS, VALUE_GROUP
            )
            logits = logits_of(
                product(key.to(query.dtype), query, nothing, WIDE), first + tl.arange(0, BLOCK_N), packed, head, step,
                row, rows, last, scale, softcap, mask_ptr, mask_head, mask_step, mask_token, lowest, score_ptr, SOFTCAP,
            )  # fmt: skip
            top, total, sums = fold(logits, value.to(query.dtype), top, total, sums, WIDE)
    else:
        residual = n - packed
        start = (split - packed_splits) * RESIDUAL
        rk_ptr += batch * rk_batch + kv_head * rk_head
        rv_ptr += batch * rv_batch + kv_head * rv_head
        for first in tl.range(start, tl.minimum(start + RESIDUAL, residual), BLOCK_N, num_stages=1):
            key = dense_block(rk_ptr, first, residual, rk_token, D, BLOCK_D, BLOCK_N)
            value = dense_block(rv_ptr, first, residual, rv_token, D, BLOCK_D, BLOCK_N)
            logits = logits_of(
                product(key, query, nothing, WIDE), packed + first + tl.arange(0, BLOCK_N), n, head, step, row, rows,
                last, scale, softcap, mask_ptr, mask_head, mask_step, mask_token, lowest, score_ptr, SOFTCAP,
            )  # fmt: skip
            top, total, sums = fold(logits, value, top, total, sums, WIDE)
    store_range(sums, total, top, index, row, rows, part_ptr, normaliser_ptr, D, BLOCK_D)


@triton.jit(do_not_specialize=["n", "splits"])
def _join(
    part_ptr, normaliser_ptr, score_ptr, sink_ptr, out_ptr, sum_ptr, n, splits, kv_heads, group, steps, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The first `rows` programs of a key-value head write an output row each, the others the sums of TOKENS tokens."""
    rows = group * steps
    jobs = rows
    if score_ptr is not None:
        jobs += tl.cdiv(n, TOKENS)
    job, which = tl.program_id(0) % jobs, tl.program_id(0) // jobs
    if job < rows:
        row = job + tl.arange(0, 1)
        whole = normaliser_of(normaliser_ptr, sink_ptr, which, row, rows, steps, kv_heads, splits, CHUNK, 1)
        channel = tl.arange(0, BLOCK_D)
        output = tl.zeros((BLOCK_D,), tl.float32)
        for first in range(0, splits, CHUNK):
            split = first + tl.arange(0, CHUNK)
            place = (which.to(tl.int64) * splits + split) * rows + job
            logs = tl.load(normaliser_ptr + place, split < splits, float("-inf"))
            mask = (split < splits)[:, None] & (channel < D)[None, :]
            part = tl.load(part_ptr + place[:, None] * D + channel[None, :], mask, 0.0)
            output += tl.sum(part * tl.exp2(logs - whole)[:, None], 0)
        head = which % kv_heads * group + job // steps
        query = (which // kv_heads).to(tl.int64) * steps + job % steps
        tl.store(out_ptr + (query * kv_heads * group + head) * D + channel, output, channel < D)
    elif score_ptr is not None:
        token = (job - rows) * TOKENS + tl.arange(0, TOKENS)
        sums = tl.zeros((TOKENS,), tl.float32)
        for first in range(0, rows, BLOCK_M):
            row = first + tl.arange(0, BLOCK_M)
            whole = normaliser_of(normaliser_ptr, sink_ptr, which, row, rows, steps, kv_heads, splits, CHUNK, BLOCK_M)
            logit = (which.to(tl.int64) * n + token)[:, None] * rows + row[None, :]
            logits = tl.load(score_ptr + logit, (token < n)[:, None] & (row < rows)[None, :], float("-inf"))
            sums += tl.sum(tl.exp2(logits - whole[None, :]), 1)
        tl.store(sum_ptr + which.to(tl.int64) * n + token, sums, token < n)


@cache
def _shared_out(blocks: int, programs: int, slots: int) -> tuple[int, int]:
    """Into how many ranges `blocks` blocks of tokens are cut, and how many blocks each range has at most.

    Whole waves of `slots` programs do the work, each as long as its blocks and a start that costs about one block more.
    """
    costs = [(-(-programs * s // slots) * (-(-blocks // s) + 1), s) for s in range(1, min(blocks, 256) + 1)]
    per_split = -(-blocks // min(costs, default=(0, 1))[1])
    return -(-blocks // max(per_split, 1)), per_split


@cache
def _slots(device: torch.device) -> int:
    """Programs of a pass that run at once."""
    if device.type != "cuda":
        return 8
    return _PER_PROCESSOR * int(torch.cuda.get_device_properties(device).multi_processor_count)


def _blocks(rows: int, d: int, itemsize: int) -> tuple[int, int, int]:
    """BLOCK_D, BLOCK_M and BLOCK_N: 16 KiB of keys and 16 of values a block: two programs with three blocks each
    fit a multiprocessor. No more rows than registers hold.
    """
    columns = max(16, triton.next_power_of_2(d))
    tokens = min(128, max(16, 16384 // itemsize // columns))
    return columns, min(32, max(16, triton.next_power_of_2(rows))), tokens


def _stages(stages: int) -> int:
    """AMD's cards have 64 KiB of shared memory, and keep blocks under way in registers."""
    return min(2, stages) if torch.version.hip else stages


def _row_major(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _mask_arguments(mask: Tensor | None, b: int, h: int) -> tuple[Tensor | None, list[int], float]:
    """The mask as the kernels read it, its strides, and its lowest number."""
    if mask is None:
        return None, [0, 0, 0, 1], 0.0
    mask = mask.expand(b, h, -1, -1)
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8), list(mask.stride()), 0.0
    return mask, list(mask.stride()), torch.finfo(mask.dtype).min


def _joined(
    query: Tensor, kv_heads: int, n: int, splits: int, part: Tensor, logs: Tensor, scores: Tensor | None,
    sinks: Tensor | None, blocks: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (b, t, h, d) and sums (b, k, n) from the outputs of the ranges."""
    b, h, t, d = query.shape
    rows = h // kv_heads * t
    output = torch.empty(b, t, h, d, dtype=query.dtype, device=query.device)
    sums = torch.empty((0,) if scores is None else (b, kv_heads, n), dtype=torch.float32, device=query.device)
    jobs = rows + (0 if scores is None else triton.cdiv(n, _TOKENS))
    _join[(b * kv_heads * jobs,)](
        part, logs, scores, sinks, output, sums, n, splits, kv_heads, h // kv_heads, t, d, blocks[0], blocks[1], _CHUNK,
        _TOKENS,
    )  # fmt: skip
    return output, sums


def _workspace(
    query: Tensor, kv_heads: int, n: int, splits: int, with_sums: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Logits (b, k, n, rows) or None; of each range, outputs (b, k, splits, rows, d) and normalisers."""
    b, h, t, d = query.shape
    rows = h // kv_heads * t

    def empty(*shape: int) -> Tensor:
        return torch.empty(b, kv_heads, *shape, dtype=torch.float32, device=query.device)

    return empty(n, rows) if with_sums else None, empty(splits, rows, d), empty(splits, rows)


def _no_query(query: Tensor, sums: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.transpose(1, 2).shape), query.new_zeros(sums, dtype=torch.float32)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    is_causal: bool,
    with_sums: bool,
) -> tuple[Tensor, Tensor]:
    """As in `reference.py`."""
    query, key, value = map(_row_major, (query, key, value))
    (b, h, t, d), (kv_heads, n) = query.shape, key.shape[1:3]
    if query.numel() == 0:
        return _no_query(query, (b, kv_heads, n) if with_sums else (0,))
    rows = h // kv_heads * t
    blocks = _blocks(rows, d, query.element_size())
    programs = b * kv_heads * triton.cdiv(rows, blocks[1])
    splits, per_split = _shared_out(triton.cdiv(n, blocks[2]), programs, _slots(query.device))
    scores, part, logs = _workspace(query, kv_heads, n, splits, with_sums)
    mask, mask_strides, lowest = _mask_arguments(mask, b, h)
    if splits:
        _dense[(programs * splits,)](
            query, key, value, mask, scores, part, logs, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            *mask_strides, n, n - t if is_causal else n, splits, per_split * blocks[2], kv_heads, h // kv_heads, t,
            scale, softcap, lowest, d, *blocks, softcap > 0, INTERPRETED, num_stages=_stages(_DENSE_STAGES),
        )  # fmt: skip
    return _joined(query, kv_heads, n, splits, part, logs, scores, sinks, blocks)


def quantized_decode_attention(
    query: Tensor,
    key_codes: Tensor,
    key_ranges: Tensor,
    value_codes: Tensor,
    value_ranges: Tensor,
    residual_key: Tensor,
    residual_value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    key_bits: int,
    value_bits: int,
    scale: float,
    softcap: float,
    is_causal: bool,
    with_sums: bool,
) -> tuple[Tensor, Tensor]:
    """As in `reference.py`."""
    query, residual_key, residual_value = map(_row_major, (query, residual_key, residual_value))
    (b, h, t, d), (kv_heads, packed) = query.shape, value_codes.shape[1:3]
    n = packed + residual_key.shape[2]
    if query.numel() == 0:
        return _no_query(query, (b, kv_heads, n) if with_sums else (0,))
    rows = h // kv_heads * t
    blocks = _blocks(rows, d, query.element_size())
    residual = _RESIDUAL_BLOCKS * blocks[2]
    programs = b * kv_heads * triton.cdiv(rows, blocks[1])
    packed_splits, per_split = _shared_out(triton.cdiv(packed, blocks[2]), programs, _slots(query.device))
    splits = packed_splits + triton.cdiv(n - packed, residual)
    scores, part, logs = _workspace(query, kv_heads, n, splits, with_sums)
    mask, mask_strides, lowest = _mask_arguments(mask, b, h)
    caches = [_row_major(key_codes), _pairs(key_ranges), _row_major(value_codes), _pairs(value_ranges)]
    caches += [residual_key, residual_value]
    strides = [stride for x in caches for stride in x.stride()[:3]]
    _quantized[(programs * splits,)](
        query, *caches, mask, scores, part, logs, *query.stride()[:3], *strides, *mask_strides, n, packed,
        n - t if is_causal else n, splits, packed_splits, per_split * blocks[2], kv_heads, h // kv_heads, t, scale,
        softcap, lowest, d, *blocks, residual, key_bits, packed // key_ranges.shape[2], value_bits,
        d // value_ranges.shape[3], softcap > 0, INTERPRETED, num_stages=_stages(_PACKED_STAGES),
    )  # fmt: skip
    return _joined(query, kv_heads, n, splits, part, logs, scores, sinks, blocks)


def _pairs(ranges: Tensor) -> Tensor:
    """Scale and minimum of a group as one integer."""
    wide = torch.int32 if ranges.dtype == torch.float16 else torch.int64
    if ranges.stride(-1) != 1 or ranges.stride(-2) != 2:
        ranges = ranges.contiguous()
    return ranges.view(wide).squeeze(-1)


def variants() -> list[Variant]:
    """Every compilation that a launch may ask for, for common heads: 16 rows, as of one query token, and 32."""
    plain: dict[str, Any] = {"mask_ptr": None, "sink_ptr": None}
    without = plain | {"score_ptr": None}
    made = [_variant(f"dense {d}", _dense, d, plain) for d in (64, 128, 256)]
    made += [
        _variant("dense 80, no sums", _dense, 80, without),
        _variant("dense 128 float32", _dense, 128, plain, kind="*fp32"),
        _variant("dense 128, 32 rows", _dense, 128, plain | {"BLOCK_M": 32}),
        _variant("dense 128, boolean mask", _dense, 128, {}, mask="*u8"),
        _variant("dense 256, mask, soft cap", _dense, 256, {"SOFTCAP": True}),
    ]
    for bits in (2, 4, 8):
        made.append(_variant(f"quantized {bits} 128", _quantized, 128, plain | _packing(bits, 32)))
    made += [
        _variant("quantized 2 80, groups of 16", _quantized, 80, without | _packing(2, 16)),
        _variant("quantized 4 256, groups of 128", _quantized, 256, plain | _packing(4, 128)),
        _variant("quantized 4 128, float32 ranges", _quantized, 128, plain | _packing(4, 64), ranges="*i64"),
        _variant("quantized 2 128, boolean mask", _quantized, 128, _packing(2, 32), mask="*u8"),
        _variant("join 128", _join, 128, plain),
        _variant("join 256, sinks", _join, 256, {}),
    ]
    return made


def _packing(bits: int, group: int) -> dict[str, int]:
    return {"KEY_BITS": bits, "VALUE_BITS": bits, "KEY_GROUP": group, "VALUE_GROUP": group}


def _variant(
    label: str,
    function: Any,
    d: int,
    given: dict[str, Any],
    kind: str = "*bf16",
    mask: str = "*bf16",
    ranges: str = "*i32",
) -> Variant:
    """One query token. Head size, and with it the strides of a cache, are multiples of 16; what varies is not known."""
    dense = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "rk_ptr", "rv_ptr", "out_ptr", "sink_ptr"), kind)
    types = dict.fromkeys(("score_ptr", "part_ptr", "normaliser_ptr", "sum_ptr"), "*fp32") | dense
    types |= dict.fromkeys(("scale", "softcap", "lowest"), "fp32") | {
        "mask_ptr": mask,
        "kr_ptr": ranges,
        "vr_ptr": ranges,
    }
    types |= dict.fromkeys(("kc_ptr", "vc_ptr"), "*i32")
    columns, rows, tokens = _blocks(1, d, 4 if kind == "*fp32" else 2)
    known = {"D": d, "BLOCK_D": columns, "BLOCK_M": rows, "BLOCK_N": tokens, "RESIDUAL": _RESIDUAL_BLOCKS * tokens}
    known |= {"CHUNK": _CHUNK, "TOKENS": _TOKENS, "SOFTCAP": False, "WIDE": False, "steps": 1, "mask_token": 1} | given
    names = function.arg_names
    constexprs = {name: value for name, value in known.items() if name in names}
    signature = {name: types.get(name, "i32") for name in names if name not in constexprs}
    unknown = {*_VARYING, "packed", "packed_splits", "kv_heads", "group", "scale", "softcap", "lowest"}
    return Variant(
        label, function, signature, constexprs, num_stages=_PACKED_STAGES if function is _quantized else _DENSE_STAGES,
        matrix=function is not _join and kind != "*fp32",
        bandwidth_bound=function is not _join, divisible=[name for name in signature if name not in unknown],
    )  # fmt: skip
