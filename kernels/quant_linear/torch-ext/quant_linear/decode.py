"""Triton functions that decode: packed words to codes, zero points and weights. Imported by `kernel.py` alone.

Shape legend: d_in, d_out features, g groups along d_in. A "part" is what holds whole codes: a word, or 24 of the 96
bits that three words of 3-bit codes form.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl


@triton.jit
def quad_of(x_ptr, offset, mask, X: tl.constexpr):
    """Four neighbours of x as float32: one load of 64 bits where x has 16 bits and comes as int64."""
    if X == tl.float32:
        a = tl.load(x_ptr + offset, mask, 0.0)
        b = tl.load(x_ptr + offset + 1, mask, 0.0)
        c = tl.load(x_ptr + offset + 2, mask, 0.0)
        d = tl.load(x_ptr + offset + 3, mask, 0.0)
    else:
        four = tl.load(x_ptr + offset // 4, mask, 0)
        a = four.to(tl.int16).to(X, bitcast=True).to(tl.float32)
        b = (four >> 16).to(tl.int16).to(X, bitcast=True).to(tl.float32)
        c = (four >> 32).to(tl.int16).to(X, bitcast=True).to(tl.float32)
        d = (four >> 48).to(tl.int16).to(X, bitcast=True).to(tl.float32)
    return a, b, c, d


@triton.jit
def biased(part, INDEX: tl.constexpr, BITS: tl.constexpr, SHARED: tl.constexpr):
    """Code INDEX of a part plus a power of two (its bias), as float32, in at most two integer instructions.

    The code is masked where it lies in the mantissa and given the exponent that makes its last bit worth one. SHARED
    neighbours lie in the mantissa after one shift.
    """
    place: tl.constexpr = 23 - BITS * (SHARED - INDEX % SHARED)
    shift: tl.constexpr = 23 - BITS * SHARED - INDEX // SHARED * SHARED * BITS
    if shift >= 0:
        moved = part << shift
    else:
        moved = part >> -shift
    mask: tl.constexpr = ((1 << BITS) - 1) << place
    exponent: tl.constexpr = (150 - place) << 23
    return ((moved & mask) | exponent).to(tl.float32, bitcast=True)


@triton.jit
def zero_points(z_ptr, group, n, mask, d_out, BITS: tl.constexpr, OFFSET: tl.constexpr, AWQ: tl.constexpr):
    """Zero points of outputs n in a group (both broadcast), uint32."""
    bit = n % 8 // 2 * 4 + n % 2 * 16 if AWQ else n * BITS % 32
    width = d_out * BITS // 32
    at = z_ptr + group * width + n * BITS // 32
    shift = bit.to(tl.uint32)
    word = tl.load(at, mask, 0).to(tl.uint32, bitcast=True)
    if BITS == 3:
        following = tl.load(at + 1, mask & (bit > 29), 0).to(tl.uint32, bitcast=True)
        zero = ((word >> shift | (following << 1) << (31 - shift)) + OFFSET) & 7
    else:
        # The offset is added to the whole word, carries and all, as those who write the format subtract it.
        ones: tl.constexpr = OFFSET * (0xFFFFFFFF // ((1 << BITS) - 1))
        zero = ((word + ones) >> shift) & ((1 << BITS) - 1)
    return zero


@triton.jit
def exact(code):
    """A code below 2^23 as float32 plus 2^23; differences of two such numbers are exact."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def gptq_parts(q_ptr, first, n, inside, end, d_out, SPAN: tl.constexpr, BITS: tl.constexpr):
    """Parts of SPAN columns from `first` (lanes, 1) on, in order, each (lanes, outputs), all loads before any use."""
    at = q_ptr + (first // 32 * BITS).to(tl.int64) * d_out + n
    words = ()
    for i in tl.static_range(SPAN * BITS // 32):
        # d_in ends where a word ends, or a block of three
        column = i // 3 * 32 if BITS == 3 else i * (32 // BITS)
        mask = inside & (first + column < end)
        words += (tl.load(at + i * d_out, mask, 0).to(tl.uint32, bitcast=True),)
    if BITS == 3:
        parts = ()
        for i in tl.static_range(0, SPAN * BITS // 32, 3):
            a, b, c = words[i], words[i + 1], words[i + 2]
            parts += (a, a >> 24 | b << 8, b >> 16 | c << 16, c >> 8)
    else:
        parts = words
    return parts


@triton.jit
def _load(q_ptr, row, column, rows, width):
    """Words (rows, columns) from `row` and `column` on, zero outside."""
    mask = (row < rows)[:, None] & (column < width)[None, :]
    return tl.load(q_ptr + (row * width)[:, None] + column[None, :], mask, 0).to(tl.uint32, bitcast=True)


@triton.jit
def _codes(
    q_ptr, k0, n0, d_in, d_out, BITS: tl.constexpr, AWQ: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A tile of codes (BLOCK_K, BLOCK_N), uint32. Words are halved again and again within a thread's registers."""
    if AWQ:
        width = d_out // 8
        base = q_ptr + tl.cast(k0, tl.int64) * width
        t = _load(base, tl.arange(0, BLOCK_K), n0 // 8 + tl.arange(0, BLOCK_N // 8), d_in - k0, width)
        # Output 4 a + 2 b + e of a word lies at bit 8 a + 4 b + 16 e.
        t = tl.join(t, t >> 8)
        t = tl.join(t, t >> 4)
        t = tl.join(t, t >> 16)
    else:
        n = n0 + tl.arange(0, BLOCK_N)
        if BITS == 3:
            base = q_ptr + tl.cast(k0 // 32 * 3, tl.int64) * d_out
            first = tl.arange(0, BLOCK_K // 32) * 3
            rows = (d_in - k0) // 32 * 3
            a = _load(base, first, n, rows, d_out)
            b = _load(base, first + 1, n, rows, d_out)
            c = _load(base, first + 2, n, rows, d_out)
            t = tl.join(tl.join(a, b >> 16 | c << 16), tl.join(a >> 24 | b << 8, c >> 8))
            t = tl.join(t, t >> 12)
            t = tl.join(t, t >> 6)
            t = tl.permute(tl.join(t, t >> 3), (0, 2, 3, 4, 5, 6, 1))
        else:
            base = q_ptr + tl.cast(k0 * BITS // 32, tl.int64) * d_out
            t = _load(base, tl.arange(0, BLOCK_K * BITS // 32), n, (d_in - k0) * BITS // 32, d_out)
            t = tl.join(t, t >> 16)
            t = tl.join(t, t >> 8)
            if BITS == 8:
                t = tl.permute(t, (0, 2, 3, 1))
            elif BITS == 4:
                t = tl.permute(tl.join(t, t >> 4), (0, 2, 3, 4, 1))
            else:
                t = tl.join(t, t >> 4)
                t = tl.permute(tl.join(t, t >> 2), (0, 2, 3, 4, 5, 1))
    return tl.reshape(t & ((1 << BITS) - 1), (BLOCK_K, BLOCK_N))


@triton.jit
def weights(
    q_ptr, z_ptr, s_ptr, g_ptr, k0, n0, d_in, d_out, group_size,
    BITS: tl.constexpr, OFFSET: tl.constexpr, AWQ: tl.constexpr, UNIFORM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of the weight (BLOCK_K, BLOCK_N), float32; zero outside. UNIFORM: its columns lie in one group."""
    code = exact(_codes(q_ptr, k0, n0, d_in, d_out, BITS, AWQ, BLOCK_K, BLOCK_N))
    n = (n0 + tl.arange(0, BLOCK_N))[None, :]
    if UNIFORM:
        group = k0 // group_size
        mask = n < d_out
    else:
        k = k0 + tl.arange(0, BLOCK_K)
        if g_ptr is None:
            group = (k // group_size)[:, None]
        else:
            group = tl.load(g_ptr + k, k < d_in, 0)[:, None]
        mask = (k < d_in)[:, None] & (n < d_out)
    zero = exact(zero_points(z_ptr, group, n, mask, d_out, BITS, OFFSET, AWQ))
    return (code - zero) * tl.load(s_ptr + group * d_out + n, mask, 0.0).to(tl.float32)
