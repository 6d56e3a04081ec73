"""The E8P codebook and its residual extensions against their definition and brute force."""

import pytest
import torch

from hf_efficiency.quantization.e8p import (
    CODEBOOKS,
    Codebook,
    decode,
    e8_table,
    e8p_patterns,
    e8p_table,
    nearest_e8,
    nearest_e8p,
    rivals_e8p,
)


def gaussian(n, seed=0):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def squared_distances(x, table):
    return torch.cdist(x.double(), table.double() / 4).square()


def test_patterns_are_those_of_the_paper():
    patterns = e8p_patterns()
    norms = patterns.square().sum(1)
    assert patterns.shape == (256, 8)
    assert (patterns.unique(dim=0).shape[0], int((norms <= 10).sum()), int((norms == 12).sum())) == (256, 227, 29)
    assert int((patterns.amax(1) == 2.5).sum()) == 64
    # Sorted, as in the released table.
    assert torch.equal(patterns[:227], patterns[:227].unique(dim=0))


def test_codewords_are_distinct_and_lie_in_the_shifted_lattice():
    table = e8p_table()
    assert table.unique(dim=0).shape == (65536, 8)
    shift = 1 - 2 * (torch.arange(65536) >> 7 & 1)
    half_integers = (table.long() - shift[:, None]) // 2  # twice the member of D8 + 1/2
    assert torch.equal(2 * half_integers + shift[:, None], table.long())
    assert (half_integers % 2 == 1).all()
    assert (half_integers.sum(1) % 4 == 0).all()  # even coordinate sum


def test_one_code_by_hand():
    # Pattern 0 is all 1/2, sum 4: even. Coordinates 0 and 2 negative, shift -1/4.
    code = 0 << 8 | 1 << 7 | 0b101
    assert e8p_table()[code].tolist() == [-3, 1, -3, 1, 1, 1, 1, 1]
    # One negative among the first seven forces the eighth.
    assert e8p_table()[1].tolist() == [-1, 3, 3, 3, 3, 3, 3, -1]


def test_one_bit_codebook_is_a_piece_of_e8():
    table = e8_table().double() / 4
    norms, counts = table.square().sum(1).unique(return_counts=True)
    assert (norms.tolist(), counts.tolist()) == ([0, 2, 4], [1, 240, 15])
    assert table.unique(dim=0).shape == (256, 8)
    assert (table @ table.T == (table @ table.T).round()).all()  # E8 is integral


@pytest.mark.parametrize("scale", [0.3, 1.03, 1.5, 4.0])
def test_search_finds_the_nearest_codeword(scale):
    x = gaussian(1500) * scale
    found = decode(nearest_e8p(x)[:, None], e8p_table()).double() / 4
    best = squared_distances(x, e8p_table()).amin(1)
    torch.testing.assert_close((x - found).square().sum(1), best, rtol=1e-5, atol=1e-5)


def test_search_of_ties_and_of_far_points():
    x = torch.stack([torch.zeros(8), torch.ones(8), torch.full((8,), 50.0), torch.tensor([1.0, 2, 0, 0, 1, 1, -1, -2])])
    found = decode(nearest_e8p(x)[:, None], e8p_table()).double() / 4
    best = squared_distances(x, e8p_table()).amin(1)
    torch.testing.assert_close((x - found).square().sum(1), best, rtol=1e-5, atol=1e-5)


def test_codewords_are_their_own_nearest():
    codes = torch.arange(65536).to(torch.int16)
    assert torch.equal(nearest_e8p(decode(codes[:, None], e8p_table()).float() / 4), codes)


def test_rivals_are_the_best_of_either_shift():
    x = gaussian(500, seed=3)
    codes = rivals_e8p(x)
    assert torch.equal(codes[:, 0], nearest_e8p(x))
    distances = squared_distances(x, e8p_table())
    minus = (torch.arange(65536) >> 7 & 1).bool()
    worse = torch.maximum(distances[:, minus].amin(1), distances[:, ~minus].amin(1))
    second = decode(codes[:, 1:], e8p_table()).double() / 4
    torch.testing.assert_close((x - second).square().sum(1), worse, rtol=1e-5, atol=1e-5)


def test_one_bit_search():
    x = gaussian(500, seed=4)
    found = decode(nearest_e8(x)[:, None], e8_table()).double() / 4
    best = squared_distances(x, e8_table()).amin(1)
    torch.testing.assert_close((x - found).square().sum(1), best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("codebook", "expected"),
    [
        (Codebook(2, 1.03), 0.0916),  # FORMATS section 2; 2-bit Lloyd-Max reaches 0.1175
        (Codebook(3, 0.98, 2.04), 0.0295),
        (CODEBOOKS[4], 0.0079),
    ],
)
def test_gaussian_error(codebook, expected):
    x = gaussian(40000, seed=5)
    _, value = codebook.quantize(x * codebook.scale)
    assert (value / codebook.scale - x).square().mean().item() == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebook_decodes_what_it_encodes(bits):
    codebook = CODEBOOKS[bits]
    codes, value = codebook.quantize(gaussian(64))
    assert [c.dtype for c in codes] == list(codebook.code_dtypes)
    assert 16 * sum(c.element_size() for c in codes) == 16 * bits
    stored = [c.view(8, 8) for c in codes]
    assert torch.equal(codebook.decode(stored), value.view(8, 64))
    assert torch.equal(codebook.decode(stored, torch.bfloat16), value.view(8, 64).bfloat16())
