"""Bit layouts: words put together by hand, and round trips of any size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_efficiency.quantization.formats import (
    BITS,
    LAYOUTS,
    AffineTensors,
    AWQLayout,
    GPTQLayout,
    default_g_idx,
    group_count,
    pack_dense,
    unpack_dense,
)


def words(tensor):
    """Unsigned."""
    return [[word & 0xFFFFFFFF for word in row] for row in tensor.tolist()]


def codes_of(rows):
    return torch.tensor(rows, dtype=torch.uint8)


def plain(codes, zeros, group_size=-1, scales=None):
    scales = torch.ones(zeros.shape) if scales is None else scales
    return AffineTensors(codes, scales, zeros, default_g_idx(codes.shape[1], group_size))


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
        (2, [3] + [0] * 16, [3, 0]),
        (4, [1, 2, 3, 4, 5, 6, 7, 8], [0x87654321]),
        (8, [1, 2, 3, 254], [0xFE030201]),
        # Code 10 holds bits 30 to 32, code 21 bits 63 to 65: both straddle words.
        (3, [0] * 10 + [7] + [0] * 21, [0xC0000000, 1, 0]),
        (3, [0] * 10 + [5] + [0] * 21, [0x40000000, 1, 0]),
        (3, [0] * 21 + [6] + [0] * 10, [0, 0, 3]),
        (3, [0] * 31 + [7], [0, 0, 0xE0000000]),
        (3, [7] * 32, [0xFFFFFFFF] * 3),
    ],
)
def test_words_by_hand(bits, codes, expected):
    packed = pack_dense(codes_of([codes]), bits)
    assert packed.dtype == torch.int32
    assert words(packed) == [expected]
    assert unpack_dense(packed, bits, len(codes)).tolist() == [codes]


@settings(max_examples=150, deadline=None)
@given(bits=st.sampled_from(BITS), rows=st.integers(1, 5), columns=st.integers(1, 100), seed=st.integers(0, 999))
def test_any_size_is_one_string_of_bits(bits, rows, columns, seed):
    codes = torch.randint(
        0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    packed = pack_dense(codes, bits)
    assert packed.shape == (rows, -(-columns * bits // 32))
    for row, found in zip(codes.tolist(), words(packed), strict=True):
        string = sum(code << (bits * i) for i, code in enumerate(row))
        assert found == [(string >> (32 * i)) & 0xFFFFFFFF for i in range(len(found))]
    assert torch.equal(unpack_dense(packed, bits, columns), codes)


def test_one_word_a_row_of_any_stride():
    """A column of a wider tensor counts as contiguous where it has one word a row."""
    codes = torch.arange(24, dtype=torch.uint8).view(3, 8) % 16
    words = pack_dense(codes, 4).flatten().as_strided((3, 1), (1, 3))
    assert words.is_contiguous()
    assert torch.equal(unpack_dense(words, 4, 8), codes)


def test_gptq_by_hand():
    """qweight runs down the inputs, qzeros along the outputs; version 1 stores the zero point less one."""
    codes = torch.zeros(8, 8, dtype=torch.uint8)
    codes[1] = torch.arange(8, dtype=torch.uint8)  # output 1 holds 0 .. 7
    zeros = torch.tensor([[8], [1], [15], [2], [3], [4], [5], [6]])
    stored = GPTQLayout(1).pack(plain(codes, zeros), 4)
    assert words(stored["qweight"]) == [[0, 0x76543210, 0, 0, 0, 0, 0, 0]]
    assert words(stored["qzeros"]) == [[0x54321E07]]
    assert words(GPTQLayout(0).pack(plain(codes, zeros), 4)["qzeros"]) == [[0x65432F18]]
    assert stored["g_idx"].tolist() == [0] * 8


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_version_1_shows_the_well_known_word(bits, word):
    zeros = torch.full((32, 1), 1 << (bits - 1))
    stored = GPTQLayout(1).pack(plain(torch.zeros(32, 32, dtype=torch.uint8), zeros), bits)
    assert set(words(stored["qzeros"])[0]) == {word}


def test_zero_points_of_0_borrow_as_in_gptqmodel():
    """It subtracts 0x11111111 from a whole word. At 3 bits, where words straddle, each field wraps by itself."""
    layout = GPTQLayout(1)
    zeros = torch.tensor([[0], [3], [0], [1], [15], [0], [0], [2]])
    stored = layout.pack(plain(torch.zeros(8, 8, dtype=torch.uint8), zeros), 4)
    assert words(stored["qzeros"]) == [[0x200F1030 - 0x11111111]]
    assert torch.equal(layout.unpack(stored, 4, 8, 8).zeros.int(), zeros.int())
    stored = layout.pack(plain(torch.zeros(32, 32, dtype=torch.uint8), torch.zeros(32, 1, dtype=torch.int32)), 3)
    assert words(stored["qzeros"]) == [[0xFFFFFFFF] * 3]


def test_awq_by_hand():
    """Nibble i of a word holds output (0, 2, 4, 6, 1, 3, 5, 7)[i]; zero points likewise, and as they are."""
    codes = torch.arange(16, dtype=torch.uint8).view(16, 1)  # output o holds o
    stored = AWQLayout().pack(plain(codes, codes.int()), 4)
    assert words(stored["qweight"]) == [[0x75316420, 0xFDB9ECA8]]
    assert words(stored["qzeros"]) == [[0x75316420, 0xFDB9ECA8]]
    assert stored["scales"].shape == (1, 16)
    back = AWQLayout().unpack(stored, 4, 1, 16)
    assert (back.codes.tolist(), back.zeros.tolist()) == (codes.tolist(), codes.tolist())


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(LAYOUTS)),
    bits=st.sampled_from(BITS),
    d_in=st.integers(1, 4),
    d_out=st.integers(1, 4),
    group_size=st.sampled_from([-1, 8, 32, 48, 64]),
    permuted=st.booleans(),
    seed=st.integers(0, 999),
)
def test_layouts_round_trip(name, bits, d_in, d_out, group_size, permuted, seed):
    generator = torch.Generator().manual_seed(seed)
    d_in, d_out, layout = 32 * d_in, 32 * d_out, LAYOUTS[name]
    if name == "awq":
        bits, permuted = 4, False
        group_size = group_size if d_in % group_size == 0 else -1
    groups = group_count(d_in, group_size)
    g_idx = default_g_idx(d_in, group_size)
    tensors = AffineTensors(
        torch.randint(0, 1 << bits, (d_out, d_in), generator=generator, dtype=torch.uint8),
        torch.rand(d_out, groups, generator=generator).half().float(),
        torch.randint(0, 1 << bits, (d_out, groups), generator=generator, dtype=torch.int32),
        g_idx[torch.randperm(d_in, generator=generator)] if permuted else g_idx,
    )
    layout.check(d_in, d_out, bits, group_size)
    stored = layout.pack(tensors, bits)
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == layout.declare(d_in, d_out, bits, group_size)
    back = layout.unpack(stored, bits, d_in, d_out)
    for field in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(back, field).double(), getattr(tensors, field).double())


@pytest.mark.parametrize(("group_size", "expected"), [(-1, [0] * 5), (2, [0, 0, 1, 1, 2]), (5, [0] * 5), (9, [0] * 5)])
def test_groups(group_size, expected):
    assert default_g_idx(5, group_size).tolist() == expected
    assert group_count(5, group_size) == expected[-1] + 1


@pytest.mark.parametrize(
    ("layout", "arguments", "message"),
    [
        ("gptq", (60, 64, 4, 20), "in_features=60 does not fill whole 32-bit words at 4 bits.*a multiple of 8"),
        ("gptq", (64, 60, 4, 32), "out_features=60 does not fill whole 32-bit words at 4 bits.*a multiple of 8"),
        ("gptq", (48, 64, 3, 16), "in_features=48 .* at 3 bits.* a multiple of 32.*modules_to_not_convert"),
        ("gptq_v2", (8, 64, 2, 8), "in_features=8 .* at 2 bits.* a multiple of 16"),
        ("awq", (64, 64, 3, 32), "the awq format holds 4-bit codes only, got bits=3"),
        ("awq", (64, 60, 4, 32), "out_features=60 is no multiple of 8"),
        ("awq", (576, 64, 4, 128), "no ragged last group: in_features=576 is no multiple of group_size=128.*64 or 32"),
    ],
)
def test_what_a_layout_can_not_hold(layout, arguments, message):
    with pytest.raises(ValueError, match=message):
        LAYOUTS[layout].check(*arguments)
