"""GPTQ against the paper's Algorithm 1 written out column by column, and what it must survive.

Shape legend: d_out rows, d_in columns, n calibration rows.
"""

import pytest
import torch
from torch import nn

from hf_efficiency.calibration.method import InputGroup
from hf_efficiency.quantization.affine import AffineGrid
from hf_efficiency.quantization.formats import default_g_idx
from hf_efficiency.quantization.gptq import GPTQ, gptq_solve, inverse_factor


def problem(d_out, d_in, n=512, seed=0):
    """A weight (d_out, d_in) and the Hessian of correlated inputs whose features differ in energy."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator) * 0.05
    mixing = torch.randn(d_in, d_in, generator=generator) / d_in**0.5 + torch.eye(d_in)
    x = torch.randn(n, d_in, generator=generator) @ mixing * torch.rand(d_in, generator=generator).add(0.1)
    return weight, x.T @ x / n


def textbook(weight, hessian, grid, damp=0.01, order=None):
    """Algorithm 1 of the GPTQ paper with B = 1, in float64: the inverse is updated by Gaussian elimination.

    Groups without an order take their scale when their first column comes up; with one, all scales are set beforehand.
    """
    w, h = weight.double(), hessian.double().clone()
    d_in = w.shape[1]
    g_idx = default_g_idx(d_in, grid.group_size).long()
    h.diagonal().add_(damp * h.diagonal().mean())
    inverse = torch.linalg.inv(h)
    scales, zeros = (t.double() for t in grid.fit(weight))
    result = torch.empty_like(w)
    for i in range(d_in) if order is None else order.tolist():
        group = g_idx[i]
        if order is None and (i == 0 or group != g_idx[i - 1]):
            members = w[:, g_idx == group].float()
            fresh = AffineGrid(grid.bits, -1, grid.sym).fit(members)
            scales[:, group], zeros[:, group] = (t[:, 0].double() for t in fresh)
        s, z = scales[:, group], zeros[:, group]
        q = s * ((w[:, i] / s).round().add(z).clamp(0, grid.top) - z)
        result[:, i] = q
        error = (w[:, i] - q) / inverse[i, i]
        w = w - error[:, None] * inverse[i]
        inverse = inverse - inverse[:, [i]] * inverse[[i]] / inverse[i, i]
    return result


def decoded(tensors):
    index = tensors.g_idx.long()
    return tensors.scales[:, index] * (tensors.codes.float() - tensors.zeros.float()[:, index])


def solve(weight, hessian, grid, damp=0.01, order=None):
    return decoded(gptq_solve(weight, inverse_factor(hessian, order, damp, "layer"), grid, order))


def by_energy(hessian):
    return hessian.diagonal().argsort(descending=True, stable=True)


def loss(weight, found, hessian):
    """tr(dW H dWᵀ)."""
    difference = (weight - found).double()
    return ((difference @ hessian.double()) * difference).sum()


def nearest(weight, grid):
    return decoded(grid.quantize(weight, *grid.fit(weight)))


def group_of(hessian, *weights):
    linears = []
    for weight in weights:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data.copy_(weight)
        linears.append(linear)
    return InputGroup([f"block.linear{i}" for i in range(len(linears))], linears, hessian, None, {})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [-1, 16, 32, 48])
@pytest.mark.parametrize("ordered", [False, True])
def test_equals_algorithm_1(bits, sym, group_size, ordered):
    weight, hessian = problem(24, 80)  # 80 columns: more than one lazy block, and ragged groups of 32 and 48
    order = by_energy(hessian) if ordered else None
    grid = AffineGrid(bits, group_size, sym)
    found = solve(weight, hessian, grid, order=order)
    expected = textbook(weight, hessian, grid, order=order).float()
    # A tie that float32 breaks otherwise changes the rest of its row.
    same = torch.isclose(found, expected, rtol=1e-4, atol=1e-5).all(1)
    assert same.sum() >= 23


@pytest.mark.parametrize("d_in", [63, 64, 65, 130])
def test_lazy_blocks_of_any_width(d_in):
    weight, hessian = problem(4, d_in)
    grid = AffineGrid(4, -1)
    expected = textbook(weight, hessian, grid).float()
    assert torch.isclose(solve(weight, hessian, grid), expected, rtol=1e-4, atol=1e-5).all(1).sum() >= 3


@pytest.mark.parametrize(("bits", "share"), [(2, 0.9), (3, 0.65), (4, 0.6), (8, 0.6)])
@pytest.mark.parametrize("ordered", [False, True])
def test_loss_is_well_below_rounding(bits, share, ordered):
    weight, hessian = problem(48, 128)
    grid = AffineGrid(bits, 32)
    found = solve(weight, hessian, grid, order=by_energy(hessian) if ordered else None)
    assert loss(weight, found, hessian) < share * loss(weight, nearest(weight, grid), hessian)


def test_order_by_energy_helps():
    weight, hessian = problem(48, 128)
    grid = AffineGrid(3, -1)
    losses = [loss(weight, solve(weight, hessian, grid, order=o), hessian) for o in (None, by_energy(hessian))]
    assert losses[1] < losses[0]


def test_a_diagonal_hessian_leaves_rounding():
    """Without correlations there is no error to spread: the result is the nearest one."""
    weight = problem(8, 64)[0]
    grid = AffineGrid(4, 16)
    found = solve(weight, torch.diag(torch.rand(64) + 0.1), grid)
    assert torch.equal(found, nearest(weight, grid))


def test_two_columns_by_hand():
    """H = (1, 1/2; 1/2, 1), no damping to speak of: the error of column 0 moves column 1 by half of it.

    Scale 1 and zero point 1 at 2 bits. 0.4 rounds to 0; column 1 goes from 1.4 to 1.4 + 0.4 / 2 = 1.6, which rounds
    to 2 and not to 1.
    """
    weight = torch.tensor([[0.4, 1.4, -1.0, 2.0]])
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 0.5
    grid = AffineGrid(2, -1)
    assert grid.fit(weight)[0].item() == 1
    assert solve(weight, hessian, grid, damp=1e-6).tolist() == [[0, 2, -1, 2]]
    assert nearest(weight, grid).tolist() == [[0, 1, -1, 2]]


def test_ragged_group_of_the_demo_model():
    weight, hessian = problem(8, 576, n=1024)
    for order in (None, by_energy(hessian)):
        tensors = gptq_solve(weight, inverse_factor(hessian, order, 0.01, "layer"), AffineGrid(4, 128), order)
        assert tensors.scales.shape == (8, 5)
        assert tensors.g_idx.tolist() == [i // 128 for i in range(576)]
        grid = AffineGrid(4, 128)
        assert loss(weight, decoded(tensors), hessian) < 0.6 * loss(weight, nearest(weight, grid), hessian)


@pytest.mark.parametrize("ordered", [False, True])
def test_dead_columns_are_rounded(ordered):
    weight, hessian = problem(16, 64)
    dead = torch.tensor([0, 5, 17, 63])
    hessian[dead] = 0
    hessian[:, dead] = 0
    grid = AffineGrid(4, 32)
    order = by_energy(hessian) if ordered else None
    found = solve(weight, hessian, grid, order=order)
    assert loss(weight, found, hessian) < 0.65 * loss(weight, nearest(weight, grid), hessian)
    scales = gptq_solve(weight, inverse_factor(hessian, order, 0.01, "layer"), grid, order).scales
    step = scales.repeat_interleave(32, 1)[:, dead]
    assert ((found - weight)[:, dead].abs() <= 0.51 * step).all()


def test_no_input_at_all():
    weight = problem(8, 64)[0]
    grid = AffineGrid(4, 32)
    assert torch.equal(solve(weight, torch.zeros(64, 64), grid), nearest(weight, grid))


def test_fewer_tokens_than_features():
    weight, hessian = problem(16, 128, n=20)
    assert torch.linalg.matrix_rank(hessian) < 64
    grid = AffineGrid(4, 32)
    found = solve(weight, hessian, grid)
    assert loss(weight, found, hessian) < 0.3 * loss(weight, nearest(weight, grid), hessian)


def test_damping_is_raised_until_it_is_enough():
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 1.05  # an eigenvalue of -0.05: 1 % of damping is not enough, 10 % are
    assert torch.equal(inverse_factor(hessian, None, 0.01, "layer"), inverse_factor(hessian, None, 0.1, "layer"))
    factor = inverse_factor(hessian, None, 0.1, "layer")
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(hessian + 0.1 * torch.eye(8)), rtol=1e-4, atol=1e-4)
    assert torch.equal(factor, factor.triu())


def test_not_positive_definite_names_layer_and_cure():
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 1e9
    message = r"block\.linear0: the Hessian is not positive definite, even with damp_percent raised from 0\.01 to 1000"
    with pytest.raises(ValueError, match=message + r".*num_samples.*damp_percent"):
        GPTQ(group_size=8).compress_group(group_of(hessian, torch.randn(8, 8)))


def test_members_of_a_group_are_quantized_as_if_alone():
    (first, hessian), second = problem(32, 64), problem(64, 64, seed=1)[0]
    method = GPTQ(bits=3, group_size=32)
    both = group_of(hessian, first, second)
    method.compress_group(both)
    for name, weight in (("block.linear0", first), ("block.linear1", second)):
        alone = group_of(hessian, weight)
        method.compress_group(alone)
        torch.testing.assert_close(both.layers[name].dequantize(), alone.layers["block.linear0"].dequantize())
    # The block goes on with what was stored.
    assert torch.equal(both.linears[1].weight, both.layers["block.linear1"].dequantize())


def test_overrides_change_single_layers():
    (first, hessian), second = problem(32, 64), problem(32, 64, seed=1)[0]
    group = group_of(hessian, first, second)
    dynamic = {".*linear1": {"bits": 8, "group_size": -1, "sym": True}, ".*linear": {"bits": 2}}
    GPTQ(bits=4, group_size=32, dynamic=dynamic).compress_group(group)
    two, eight = group.layers["block.linear0"], group.layers["block.linear1"]
    assert (two.bits, two.group_size, eight.bits, eight.group_size) == (2, 32, 8, -1)
    assert (eight.unpack().zeros == 128).all()
    assert (eight.dequantize() - second).norm() < 0.02 * second.norm()
    assert (two.dequantize() - first).norm() > 0.1 * first.norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "bits=5 is not supported: choose one of 2, 3, 4, 8"),
        ({"group_size": 0}, "group_size=0 must be a positive integer, or -1"),
        ({"group_size": 32.0}, r"group_size=32\.0 must be a positive integer"),
        ({"damp_percent": 0}, "damp_percent=0 must lie between 0 and 1"),
        ({"damp_percent": 1.5}, r"damp_percent=1\.5 must lie between 0 and 1"),
        ({"format": "exl2"}, "format='exl2' is unknown: choose one of gptq, gptq_v2, awq"),
        ({"format": "awq", "bits": 3}, "the awq format holds 4-bit codes only, got bits=3"),
        ({"dynamic": {"(": {}}}, r"dynamic: '\(' is no regular expression"),
        ({"dynamic": {"a": {"damp": 1}}}, r"dynamic\['a'\] sets damp, but only bits, group_size, sym"),
        ({"dynamic": {"a": {"bits": 7}}}, "bits=7 is not supported"),
        ({"refine_steps": -1}, "refine_steps=-1 must be a whole number"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GPTQ(**arguments).validate()
