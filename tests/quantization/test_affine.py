"""Affine grids: numbers worked by hand, and what must hold for any weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_efficiency.quantization.affine import AffineGrid, storable_scale
from hf_efficiency.quantization.formats import AffineTensors


def decode(tensors: AffineTensors):
    """(d_out, d_in), from the definition w = s (q - z)."""
    index = tensors.g_idx.long()
    return tensors.scales[:, index] * (tensors.codes.float() - tensors.zeros.float()[:, index])


def rounded(grid, weight, importance=None):
    tensors = grid.quantize(weight, *grid.fit(weight, importance))
    return tensors, decode(tensors)


def test_asymmetric_by_hand():
    """Range -1 to 2.75 in 15 steps of 0.25: zero point 4; 0.3 lies nearest to 1 step, code 5."""
    weight = torch.tensor([[-1.0, 0.0, 0.3, 2.75]])
    tensors, found = rounded(AffineGrid(4, -1), weight)
    assert (tensors.scales.tolist(), tensors.zeros.tolist()) == ([[0.25]], [[4]])
    assert tensors.codes.tolist() == [[0, 4, 5, 15]]
    assert found.tolist() == [[-1.0, 0.0, 0.25, 2.75]]


def test_symmetric_by_hand():
    """Largest magnitude 1.5: 7 steps of 2 * 1.5 / 7 = 0.4286, stored as 0.4277 (109.5 / 256); zero point 4."""
    tensors, found = rounded(AffineGrid(3, -1, sym=True), torch.tensor([[-1.5, 0.5, 1.5]]))
    assert (tensors.scales.tolist(), tensors.zeros.tolist()) == ([[109.5 / 256]], [[4]])
    # -1.5 is -3.507 steps, 1.5 would be code 7.5: the largest code is 7.
    assert tensors.codes.tolist() == [[0, 5, 7]]
    assert found.tolist() == [[-4 * 109.5 / 256, 109.5 / 256, 3 * 109.5 / 256]]


def test_groups_by_hand():
    """Columns 0-1, 2-3 and a ragged 4: ranges 3, 6 and 0 to 9 in 3 steps."""
    weight = torch.tensor([[-1.0, 2.0, -2.0, 4.0, 9.0]])
    tensors, found = rounded(AffineGrid(2, 2), weight)
    assert tensors.scales.tolist() == [[1, 2, 3]]
    # A zero point of 0 is not used: version 1 of the format would store -1.
    assert tensors.zeros.tolist() == [[1, 1, 1]]
    assert tensors.g_idx.tolist() == [0, 0, 1, 1, 2]
    assert found.tolist() == [[-1, 2, -2, 4, 6]]


def test_block_and_tensor_share_scales():
    weight = torch.tensor([[-1.0, 2.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [-2.0, 0.0, 0.0, 0.0]])
    scales, zeros = AffineGrid(2, 2, rows=2).fit(weight)
    assert scales[:, 0].tolist() == [1, 1, 171 / 256]  # 2 / 3, rounded
    assert zeros[:, 0].tolist() == [1, 1, 3]
    scales, zeros = AffineGrid(2, -1, rows=0).fit(weight)
    assert (scales.shape, zeros.shape) == ((3, 1), (3, 1))
    assert scales.unique().numel() == zeros.unique().numel() == 1
    assert scales[0, 0] == storable_scale(torch.tensor(4 / 3))


def test_ragged_block():
    """5 rows in blocks of 2 by 3 over 7 columns: the last band and the last group are smaller."""
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    scales, zeros = AffineGrid(4, 3, rows=2).fit(weight)
    for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
        for group, columns in enumerate((slice(0, 3), slice(3, 6), slice(6, 7))):
            tile = weight[rows, columns].reshape(1, -1)
            scale, zero = AffineGrid(4, -1).fit(tile)
            assert (scales[rows, group] == scale[0, 0]).all()
            assert (zeros[rows, group] == zero[0, 0]).all()


weights = st.builds(
    lambda rows, columns, seed, spread, shift: (
        spread * (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + shift)
    ),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(0, 1000),
    st.sampled_from([1e-3, 0.02, 1.0, 300.0]),
    st.sampled_from([-4.0, -1.0, 0.0, 0.5, 4.0]),
)
grids = st.builds(
    AffineGrid,
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([-1, 1, 5, 8, 32]),
    sym=st.booleans(),
    rows=st.sampled_from([0, 1, 2, 3]),
    clip=st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(weights, grids)
def test_any_weight(weight, grid):
    tensors, found = rounded(grid, weight)
    index = tensors.g_idx.long()
    scales, zeros = tensors.scales[:, index], tensors.zeros[:, index].float()
    assert tensors.codes.max() <= grid.top
    assert ((zeros >= 1) & (zeros <= grid.top)).all()
    # Rounded to the nearest point inside the range, cut off at its ends outside it.
    inside = (weight >= -zeros * scales) & (weight <= (grid.top - zeros) * scales)
    assert ((weight - found).abs()[inside] <= scales[inside] * 0.5001).all()
    assert (found[~inside].abs() <= weight[~inside].abs()).all()
    # Zero is a point of every grid.
    assert not decode(grid.quantize(torch.zeros_like(weight), tensors.scales, tensors.zeros)).any()
    # Half precision holds the scales.
    assert torch.equal(tensors.scales.half().float(), tensors.scales)
    assert torch.equal(tensors.scales.bfloat16().float(), tensors.scales)
    if not grid.clip and not grid.sym:
        low, high = weight.amin().clamp(max=0), weight.amax().clamp(min=0)
        # No weight lies further outside than the zero point and the scale were rounded by.
        assert found.min() >= low - scales.max() * (1 + grid.top / 256)
        assert found.max() <= high + scales.max() * (1 + grid.top / 256)


@settings(max_examples=60, deadline=None)
@given(weights, grids, st.booleans())
def test_clipping_never_raises_the_error(weight, grid, weighed):
    importance = torch.rand(weight.shape[1]) if weighed else torch.ones(weight.shape[1])
    errors = []
    for clip in (False, True):
        tried = AffineGrid(grid.bits, grid.group_size, grid.sym, grid.rows, clip)
        found = rounded(tried, weight, importance if weighed else None)[1]
        errors.append(((weight - found).double().square() * importance).sum())
    assert errors[1] <= errors[0] * (1 + 1e-5)


def test_clipping_cuts_outliers():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 7] = 6
    full, cut = (rounded(AffineGrid(3, -1, clip=clip), weight)[1] for clip in (False, True))
    assert (weight - cut).square().sum() < 0.95 * (weight - full).square().sum()
    assert (cut[:, 7] - 6).abs().max() > 1
    # Where the outlier weighs most, it is kept.
    importance = torch.ones(64)
    importance[7] = 1e4
    kept = rounded(AffineGrid(3, -1, clip=True), weight, importance)[1]
    assert (kept[:, 7] - 6).abs().max() < 0.6


def test_constant_rows_are_exact_or_near():
    weight = torch.tensor([[0.0, 0.0], [3.0, 3.0], [-3.0, -3.0], [1e-9, -1e-9]])
    found = rounded(AffineGrid(4, -1), weight)[1]
    assert not found[0].any()
    torch.testing.assert_close(found[1:3], weight[1:3], rtol=0.08, atol=0)
    assert found[3].abs().max() < 1e-4


@pytest.mark.parametrize("spread", [1e-4, 1e-2, 1.0, 1e4])
def test_precision_does_not_depend_on_magnitude(spread):
    """8 bits leave about 1 % of error, for small weights too (their scales are subnormal in float16)."""
    weight = spread * torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    found = rounded(AffineGrid(8, 64), weight)[1]
    assert (weight - found).norm() < 0.012 * weight.norm()


def test_permuted_groups():
    """The group of a column is what g_idx says."""
    weight = torch.tensor([[1.0, 10.0, 2.0, 20.0]])
    scales, zeros = torch.tensor([[1.0, 10.0]]), torch.tensor([[1.0, 2.0]])
    tensors = AffineGrid(4, 2).quantize(weight, scales, zeros, torch.tensor([0, 1, 0, 1], dtype=torch.int32))
    assert tensors.codes.tolist() == [[2, 3, 3, 4]]
    assert decode(tensors).tolist() == weight.tolist()
