"""Triton functions that decode: packed words to zero points and tiles of the weight. Imported by the kernels alone.

Shape legend: d_in, d_out features, g groups along d_in.
"""
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: ignore-errors

import triton
import triton.language as tl


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
def _load(q_ptr, row, column, rows, width):
    """Words (rows, columns) from `row` and `column` on, zero outside."""
    mask = (row < rows)[:, None] & (column < width)[None, :]
    return tl.load(q_ptr + (row * width)[:, None] + column[None, :], mask, 0).to(tl.uint32, bitcast=True)


@triton.jit
def _codes(
    q_ptr, k0, n0, d_in, width, BITS: tl.constexpr, AWQ: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A tile of codes (BLOCK_K, BLOCK_N), uint32. Words are halved again and again within a thread's registers."""
    if AWQ:
        base = q_ptr + tl.cast(k0, tl.int64) * width
        t = _load(base, tl.arange(0, BLOCK_K), n0 // 8 + tl.arange(0, BLOCK_N // 8), d_in - k0, width)
        # Output 4 a + 2 b + e of a word lies at bit 8 a + 4 b + 16 e.
        t = tl.join(t, t >> 8)
        t = tl.join(t, t >> 4)
        t = tl.join(t, t >> 16)
    else:
        n = n0 + tl.arange(0, BLOCK_N)
        if BITS == 3:
            base = q_ptr + tl.cast(k0 // 32 * 3, tl.int64) * width
            first = tl.arange(0, BLOCK_K // 32) * 3
            rows = (d_in - k0) // 32 * 3
            a = _load(base, first, n, rows, width)
            b = _load(base, first + 1, n, rows, width)
            c = _load(base, first + 2, n, rows, width)
            t = tl.join(tl.join(a, b >> 16 | c << 16), tl.join(a >> 24 | b << 8, c >> 8))
            t = tl.join(t, t >> 12)
            t = tl.join(t, t >> 6)
            t = tl.permute(tl.join(t, t >> 3), (0, 2, 3, 4, 5, 6, 1))
        else:
            base = q_ptr + tl.cast(k0 * BITS // 32, tl.int64) * width
            t = _load(base, tl.arange(0, BLOCK_K * BITS // 32), n, (d_in - k0) * BITS // 32, width)
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
    q_ptr, z_ptr, s_ptr, g_ptr, k0, n0, d_in, d_out, width, group_size,
    BITS: tl.constexpr, OFFSET: tl.constexpr, AWQ: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of the weight (BLOCK_K, BLOCK_N), float32; zero outside. Without an index its columns lie in one group."""
    code = exact(_codes(q_ptr, k0, n0, d_in, width, BITS, AWQ, BLOCK_K, BLOCK_N))
    n = (n0 + tl.arange(0, BLOCK_N))[None, :]
    if g_ptr is None:
        group = k0 // group_size
        mask = n < d_out
    else:
        k = k0 + tl.arange(0, BLOCK_K)
        group = tl.load(g_ptr + k, k < d_in, 0)[:, None]
        mask = (k < d_in)[:, None] & (n < d_out)
    zero = exact(zero_points(z_ptr, group, n, mask, d_out, BITS, OFFSET, AWQ))
    return (code - zero) * tl.load(s_ptr + group * d_out + n, mask, 0.0).to(tl.float32)
