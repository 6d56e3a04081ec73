# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""What the Triton code is made of: blocks of a cache and one step of the softmax. Imported by `kernel.py` alone.

Beyond the end, the last token and the last row are read again: that costs no predicates, and their logits are -inf or
not stored.

Logits are in base 2. Rows: head in the group * t + query token.
Shape legend: t query tokens, n cached tokens, d head size.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def product(left, right, total, WIDE: tl.constexpr):
    """left @ right + total in float32. WIDE: for the interpreter, whose products of bfloat16 are wrong."""
    if WIDE:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def logits_of(
    dots, token, end, head, step, row, rows, last, scale, softcap, mask_ptr, mask_head, mask_step, mask_token,
    lowest, score_ptr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Logits (tokens, rows) in base 2, -inf where nothing is seen; stores them (n, rows) where the sums are wanted."""
    logits = dots * scale
    if SOFTCAP:
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
    inside = (token < end)[:, None] & (row < rows)[None, :]
    seen = inside & (token[:, None] - step[None, :] <= last)
    if mask_ptr is not None:
        place = tl.minimum(token, end - 1).to(tl.int64)[:, None] * mask_token
        offset = place + (head * mask_head + step * mask_step)[None, :]
        mask = tl.load(mask_ptr + offset)
        if mask_ptr.dtype.element_ty == tl.uint8:
            seen = seen & (mask != 0)
        else:
            bias = mask.to(tl.float32)
            seen = seen & (bias > lowest)
            logits += bias
    logits = tl.where(seen, logits, float("-inf")) * LOG2E
    if score_ptr is not None:
        tl.store(score_ptr + token.to(tl.int64)[:, None] * rows + row[None, :], logits, inside)
    return logits


@triton.jit
def fold(logits, value, top, total, sums, WIDE: tl.constexpr):
    """One step of the online softmax: largest logit (rows,), sum of exponentials (rows,), weighted values (d, rows)."""
    new = tl.maximum(top, tl.max(logits, 0))
    base = tl.where(new == float("-inf"), 0.0, new)
    weight = tl.exp2(logits - base[None, :])
    shrink = tl.exp2(top - base)
    sums = product(tl.trans(value), weight.to(value.dtype), sums * shrink[None, :], WIDE)
    return new, total * shrink + tl.sum(weight, 0), sums


@triton.jit
def rows_of(program, steps, rows, BLOCK_M: tl.constexpr):
    """Of a program: its rows, their heads in the group and query tokens, and the rest of its index."""
    blocks = tl.cdiv(rows, BLOCK_M)
    row = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    last = tl.minimum(row, rows - 1)
    return row, last // steps, last % steps, program // blocks


@triton.jit
def query_block(q_ptr, head, step, q_head, q_step, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(d, rows) of the query."""
    channel = tl.arange(0, BLOCK_D)
    offset = (head * q_head + step * q_step)[:, None] + channel[None, :]
    return tl.trans(tl.load(q_ptr + offset, (channel < D)[None, :], 0.0))


@triton.jit
def dense_block(ptr, first, count, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """(tokens, d) of a dense cache from token `first` on, the last one again after `count`."""
    token, channel = tl.minimum(tl.arange(0, BLOCK_N), count - 1 - first), tl.arange(0, BLOCK_D)
    start = tl.cast(first, tl.int64)
    offset = token.to(tl.int64)[:, None] * stride + channel[None, :]
    return tl.load(ptr + start * stride + offset, (channel < D)[None, :], 0.0)


@triton.jit
def store_range(
    sums, total, top, index, row, rows, part_ptr, normaliser_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Writes a range's output (d, rows), normalised within the range, and the logarithm of its normaliser."""
    channel = tl.arange(0, BLOCK_D)
    place = index.to(tl.int64) * rows + row
    live = row < rows
    total = tl.where(total > 0, total, 1.0)  # top is -inf then
    output = sums / total[None, :]
    tl.store(part_ptr + place[None, :] * D + channel[:, None], output, live[None, :] & (channel < D)[:, None])
    tl.store(normaliser_ptr + place, top + tl.log2(total), live)


@triton.jit
def line_of(pairs, BITS: tl.constexpr):
    """Slope and offset: a number is slope * `unit` + offset. From a scale and a minimum in one integer."""
    if pairs.dtype == tl.int32:
        scale = pairs.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        minimum = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        scale = pairs.to(tl.int32).to(tl.float32, bitcast=True)
        minimum = (pairs >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    slope = scale * (1 << BITS)
    return slope, minimum - slope


@triton.jit
def unit(words, place, BITS: tl.constexpr):
    """1 + code / 2^BITS in float32: the code in the mantissa of 1, since conversions of integers are slow."""
    code = (words >> (place * BITS)) & ((1 << BITS) - 1)
    return ((code << (23 - BITS)) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def key_block(
    code_ptr, range_ptr, first, n, code_stride, range_stride, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(tokens, d) float32 of quantized keys from token `first` on, a multiple of BLOCK_N."""
    PACK: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = BLOCK_N // PACK
    GROUPS: tl.constexpr = (BLOCK_N + GROUP - 1) // GROUP
    channel = tl.arange(0, BLOCK_D)
    inside = (channel < D)[None, :]
    word = tl.minimum(first // PACK + tl.arange(0, WORDS), n // PACK - 1)
    part = tl.minimum(first // GROUP + tl.arange(0, GROUPS), n // GROUP - 1)
    place = word.to(tl.int64)[:, None] * code_stride + channel[None, :]
    words = tl.load(code_ptr + place, inside, 0)
    place = part.to(tl.int64)[:, None] * range_stride + channel[None, :]
    pairs = tl.load(range_ptr + place, inside, 0)
    slope, offset = line_of(pairs, BITS)
    words = words.reshape(GROUPS, WORDS // GROUPS, 1, BLOCK_D)
    units = unit(words, tl.arange(0, PACK)[None, None, :, None], BITS)
    numbers = units * slope[:, None, None, :] + offset[:, None, None, :]
    return numbers.reshape(BLOCK_N, BLOCK_D)


@triton.jit
def value_block(
    code_ptr, range_ptr, first, n, code_stride, range_stride, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(tokens, d) float32 of quantized values from token `first` on."""
    PACK: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = BLOCK_D // PACK
    GROUPS: tl.constexpr = BLOCK_D // GROUP
    token, word, part = first + tl.arange(0, BLOCK_N), tl.arange(0, WORDS), tl.arange(0, GROUPS)
    place = tl.minimum(token, n - 1).to(tl.int64)[:, None]
    words = tl.load(code_ptr + place * code_stride + word[None, :], (word < D // PACK)[None, :], 0)
    pairs = tl.load(range_ptr + place * range_stride + part[None, :], (part < D // GROUP)[None, :], 0)
    slope, offset = line_of(pairs, BITS)
    words = words.reshape(BLOCK_N, GROUPS, WORDS // GROUPS, 1)
    units = unit(words, tl.arange(0, PACK)[None, None, None, :], BITS)
    numbers = units * slope[:, :, None, None] + offset[:, :, None, None]
    return numbers.reshape(BLOCK_N, BLOCK_D)


@triton.jit
def normaliser_of(
    normaliser_ptr, sink_ptr, which, row, rows, steps, kv_heads, splits, CHUNK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Logarithm (rows,) of the sum of exponentials over all ranges, +inf for a row that sees nothing."""
    live = row < rows
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    if sink_ptr is not None:
        head = which % kv_heads * (rows // steps) + row // steps
        top = tl.load(sink_ptr + head, live, float("-inf")).to(tl.float32) * LOG2E
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    for first in range(0, splits, CHUNK):
        split = first + tl.arange(0, CHUNK)
        place = (which.to(tl.int64) * splits + split)[:, None] * rows + row[None, :]
        logs = tl.load(normaliser_ptr + place, (split < splits)[:, None] & live[None, :], float("-inf"))
        new = tl.maximum(top, tl.max(logs, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logs - base[None, :]), 0)
        top = new
    return tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
