"""The Triton code for one or two rows: multiply-adds on the ordinary cores. Imported by `kernel.py` alone.

Shape legend: n rows, d_in, d_out features, g groups along d_in; a lane is a stretch of columns that one warp or a part
of one reads. A "part" is what holds whole codes: a word, or 24 of the 96 bits that three words of 3-bit codes form.
"""
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: ignore-errors

import triton
import triton.language as tl

from .decode import exact, zero_points


@triton.jit
def _quad(x_ptr, offset, mask, x_type: tl.constexpr):
    """Four neighbours of x as float32: one load of 64 bits where x has 16 bits and comes as int64."""
    if x_type == tl.float32:
        a = tl.load(x_ptr + offset, mask, 0.0)
        b = tl.load(x_ptr + offset + 1, mask, 0.0)
        c = tl.load(x_ptr + offset + 2, mask, 0.0)
        d = tl.load(x_ptr + offset + 3, mask, 0.0)
    else:
        four = tl.load(x_ptr + offset // 4, mask, 0)
        a = four.to(tl.int16).to(x_type, bitcast=True).to(tl.float32)
        b = (four >> 16).to(tl.int16).to(x_type, bitcast=True).to(tl.float32)
        c = (four >> 32).to(tl.int16).to(x_type, bitcast=True).to(tl.float32)
        d = (four >> 48).to(tl.int16).to(x_type, bitcast=True).to(tl.float32)
    return a, b, c, d


@triton.jit
def _biased(part, INDEX: tl.constexpr, BITS: tl.constexpr, SHARED: tl.constexpr):
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
def _gptq_words(q_ptr, first, n, inside, end, d_out, SPAN: tl.constexpr, BITS: tl.constexpr):
    """The words of SPAN columns from `first` (lanes, 1) on, in order, each (lanes, outputs); zero from `end` on."""
    at = q_ptr + (first * BITS // 32).to(tl.int64) * d_out + n
    words = ()
    for i in tl.static_range(SPAN * BITS // 32):
        # d_in ends where a word ends, or a block of three
        column = i // 3 * 32 if BITS == 3 else i * (32 // BITS)
        words += (tl.load(at + i * d_out, inside & (first + column < end), 0).to(tl.uint32, bitcast=True),)
    return words


@triton.jit
def _awq_words(q_ptr, first, word, inside, end, width):
    """The words of 8 columns from `first` (lanes, 1) on, each (lanes, words); zero from `end` on."""
    at = q_ptr + first.to(tl.int64) * width + word
    words = ()
    for i in tl.static_range(8):
        words += (tl.load(at + i * width, inside & (first + i < end), 0).to(tl.uint32, bitcast=True),)
    return words


@triton.jit
def _parts(words, BITS: tl.constexpr, COUNT: tl.constexpr):
    """COUNT words as parts."""
    if BITS == 3:
        parts = ()
        for i in tl.static_range(0, COUNT, 3):
            a, b, c = words[i], words[i + 1], words[i + 2]
            parts += (a, a >> 24 | b << 8, b >> 16 | c << 16, c >> 8)
    else:
        parts = words
    return parts


@triton.jit(do_not_specialize=["n", "steps"])
def gptq_few(
    x_ptr, q_ptr, z_ptr, s_ptr, sums_ptr, n, d_in, d_out, group_size, steps,
    BITS: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, x_type: tl.constexpr,
    LANES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Bound by the bandwidth of qweight, then by integer instructions: 1.5 a code of 4 bits, beside ROWS multiplies.

    Each warp (lane) reads a stretch of SPAN columns that lies in one group, four outputs a thread; codes are summed as
    they are, plus powers of two, and scale and zero point come in once a stretch.
    """
    PART: tl.constexpr = 8 if BITS == 3 else 32 // BITS
    SHARED: tl.constexpr = 1 if x_type == tl.float32 else 8 // BITS
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = column < d_out
    lane = tl.arange(0, LANES)
    totals = ()
    for _ in tl.static_range(ROWS):
        totals += (tl.zeros((LANES, COLUMNS), tl.float32),)
    first = (tl.program_id(1) * steps * LANES + lane) * SPAN
    following = _gptq_words(q_ptr, first[:, None], column, inside, d_in, d_out, SPAN, BITS)
    for step in range(steps):
        # Loads of the next step are under way while this one computes; the assembler would move them to their use.
        words = following
        ahead = tl.where(step + 1 < steps, first + LANES * SPAN, d_in)[:, None]
        following = _gptq_words(q_ptr, ahead, column, inside, d_in, d_out, SPAN, BITS)
        parts = _parts(words, BITS, SPAN * BITS // 32)
        group = tl.minimum(first, d_in - 1)[:, None] // group_size
        scale = tl.load(s_ptr + group * d_out + column, inside, 0.0).to(tl.float32)
        zero = exact(zero_points(z_ptr, group, column, inside, d_out, BITS, OFFSET, False)) - 8388608.0
        sums, x_sums = (), ()
        for _ in tl.static_range(ROWS):
            sums += (tl.zeros((LANES, COLUMNS), tl.float32),)
        for _ in tl.static_range(ROWS * SHARED):
            x_sums += (tl.zeros((LANES,), tl.float32),)
        for start in tl.static_range(0, SPAN, 4):
            code = ()
            for i in tl.static_range(start, start + 4):
                code += (_biased(parts[i // PART], i % PART, BITS, SHARED),)
            new_sums, new_x_sums = (), ()
            for row in tl.static_range(ROWS):
                x = _quad(x_ptr, row * d_in + first + start, (first + start < d_in) & (lane * 0 + row < n), x_type)
                total = sums[row]
                for i in tl.static_range(4):
                    total += x[i][:, None] * code[i]
                new_sums += (total,)
                for i in tl.static_range(SHARED):
                    x_sum = x_sums[row * SHARED + i]
                    for other in tl.static_range(i, 4, SHARED):
                        x_sum += x[other]
                    new_x_sums += (x_sum,)
            sums, x_sums = new_sums, new_x_sums
        new_totals = ()
        for row in tl.static_range(ROWS):
            x_sum, share = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
            for i in tl.static_range(SHARED):
                x_sum += x_sums[row * SHARED + i]
                share += x_sums[row * SHARED + i] * (1 << (BITS * (SHARED - i)))
            centred = sums[row] - share[:, None] - zero * x_sum[:, None]
            new_totals += (totals[row] + centred * scale,)
        totals = new_totals
        first += LANES * SPAN
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    for row in tl.static_range(ROWS):
        to = sums_ptr + (tl.program_id(1) * n + row) * d_out + at
        tl.store(to, tl.sum(totals[row], 0), (at < d_out) & (at * 0 + row < n))


@triton.jit(do_not_specialize=["n", "steps"])
def awq_few(
    x_ptr, q_ptr, z_ptr, s_ptr, sums_ptr, n, d_in, d_out, width, group_size, steps,
    ROWS: tl.constexpr, SPAN: tl.constexpr, x_type: tl.constexpr, LANES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """As `gptq_few`, but a word holds eight outputs of one column: each nibble of a word has a sum of its own."""
    SHARED: tl.constexpr = 1 if x_type == tl.float32 else 2
    word = (tl.program_id(0) * WORDS + tl.arange(0, WORDS))[None, :]
    inside = word < width
    lane = tl.arange(0, LANES)
    totals = ()
    for _ in tl.static_range(ROWS * 8):
        totals += (tl.zeros((LANES, WORDS), tl.float32),)
    first = (tl.program_id(1) * steps * LANES + lane) * SPAN
    following = _awq_words(q_ptr, first[:, None], word, inside, d_in, width)
    for step in range(steps):
        sums, x_sums = (), ()
        for _ in tl.static_range(ROWS * 8):
            sums += (tl.zeros((LANES, WORDS), tl.float32),)
        for _ in tl.static_range(ROWS):
            x_sums += (tl.zeros((LANES,), tl.float32),)
        for start in range(0, SPAN, 8):
            words = following
            column = first + start
            ahead = tl.where(start + 8 < SPAN, column + 8, tl.where(step + 1 < steps, first + LANES * SPAN, d_in))
            following = _awq_words(q_ptr, ahead[:, None], word, inside, d_in, width)
            for quad in tl.static_range(0, 8, 4):
                new_sums, new_x_sums = (), ()
                for row in tl.static_range(ROWS):
                    mask = (column + quad < d_in) & (lane * 0 + row < n)
                    x = _quad(x_ptr, row * d_in + column + quad, mask, x_type)
                    new_x_sums += (x_sums[row] + ((x[0] + x[1]) + (x[2] + x[3])),)
                    for nibble in tl.static_range(8):
                        total = sums[row * 8 + nibble]
                        for i in tl.static_range(4):
                            total += x[i][:, None] * _biased(words[quad + i], nibble, 4, SHARED)
                        new_sums += (total,)
                sums, x_sums = new_sums, new_x_sums
        group = tl.minimum(first, d_in - 1)[:, None] // group_size
        zeros = tl.load(z_ptr + group * width + word, inside, 0).to(tl.uint32, bitcast=True)
        new_totals = ()
        for i in tl.static_range(ROWS * 8):
            output = i % 8 % 4 * 2 + i % 8 // 4
            scale = tl.load(s_ptr + group * d_out + word * 8 + output, inside, 0.0).to(tl.float32)
            # the zero point has the same power of two added as the codes
            centred = sums[i] - _biased(zeros, i % 8, 4, SHARED) * x_sums[i // 8][:, None]
            new_totals += (totals[i] + centred * scale,)
        totals = new_totals
        first += LANES * SPAN
    at_word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    for i in tl.static_range(ROWS * 8):
        output = i % 8 % 4 * 2 + i % 8 // 4
        to = sums_ptr + (tl.program_id(1) * n + i // 8) * d_out + at_word * 8 + output
        tl.store(to, tl.sum(totals[i], 0), (at_word < width) & (at_word * 0 + i // 8 < n))
