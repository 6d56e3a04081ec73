"""Subspaces against the exact SVD, and their integer codes."""

import pytest
import torch

from hf_efficiency.optim import projection
from hf_efficiency.optim.projection import (
    dequantize_projection,
    power_step,
    projection_bytes,
    quantize_projection,
    random_basis,
    randomized_basis,
    similarity,
    svd_basis,
)


def decaying(d, n, seed=0):
    """A matrix whose singular values fall by a tenth each."""
    draw = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(d, d, generator=draw)).Q
    right = torch.linalg.qr(torch.randn(n, d, generator=draw)).Q
    return left @ torch.diag(0.9 ** torch.arange(d)) @ right.T


def kept(matrix, basis):
    return ((basis.T @ matrix).square().sum() / matrix.square().sum()).item()


def test_svd_basis_keeps_the_energy_of_the_first_singular_values():
    matrix = decaying(30, 50)
    squares = 0.81 ** torch.arange(30)
    basis = svd_basis(matrix, 5)
    assert kept(matrix, basis) == pytest.approx((squares[:5].sum() / squares.sum()).item(), rel=1e-4)
    assert basis.untyped_storage().nbytes() == 30 * 5 * 4  # a copy, so that the whole factor is let go


def test_randomized_basis_is_nearly_as_good():
    matrix = decaying(60, 90)
    exact, basis = svd_basis(matrix, 10), randomized_basis(matrix, 10, seed=3)
    assert kept(matrix, basis) > 0.999 * kept(matrix, exact)
    torch.testing.assert_close(basis.T @ basis, torch.eye(10), atol=1e-5, rtol=0)
    # in the order of the singular values: the first column is the first singular vector
    assert abs((basis[:, 0] @ exact[:, 0]).item()) > 0.999
    assert torch.equal(basis, randomized_basis(matrix, 10, seed=3))


def test_power_steps_converge_to_the_singular_subspace():
    matrix = decaying(40, 60)
    exact = svd_basis(matrix, 6)
    basis = torch.linalg.qr(torch.randn(40, 6, generator=torch.Generator().manual_seed(1))).Q
    energies = [kept(matrix, basis)]
    for _ in range(40):
        basis = power_step(matrix, basis)
        energies.append(kept(matrix, basis))
    assert energies == sorted(energies) or max(energies) - energies[-1] < 1e-5
    assert energies[-1] == pytest.approx(kept(matrix, exact), rel=1e-4)


def test_power_step_keeps_signs():
    matrix = decaying(40, 60)
    exact = svd_basis(matrix, 6)
    assert ((power_step(matrix, exact) * exact).sum(0) > 0.99).all()
    assert ((power_step(matrix, -exact) * exact).sum(0) < -0.99).all()


def test_random_basis_has_variance_one_over_r():
    basis = random_basis((400, 50), 7, torch.zeros(1))
    assert basis.var().item() == pytest.approx(1 / 50, rel=0.03)
    assert torch.equal(basis, random_basis((400, 50), 7, torch.zeros(1)))
    assert not torch.equal(basis, random_basis((400, 50), 8, torch.zeros(1)))


def test_similarity_of_subspaces():
    eye = torch.eye(6)
    assert similarity(eye[:, :2], eye[:, :2].flip(1)) == pytest.approx(1)  # the same plane
    assert similarity(eye[:, :2], eye[:, 2:4]) == pytest.approx(0)
    assert similarity(eye[:, :2], eye[:, 1:3]) == pytest.approx(0.5)


@pytest.mark.parametrize(("bits", "shape"), [(4, (33, 17)), (8, (33, 17)), (4, (16, 16)), (8, (1, 1))])
def test_codes_lie_within_half_a_step(bits, shape):
    basis = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, scale, low = quantize_projection(basis, bits)
    assert codes.nbytes + scale.nbytes + low.nbytes == projection_bytes(basis.numel(), bits, 4)
    error = (dequantize_projection(codes, scale, low, bits, shape) - basis).abs().max()
    assert error <= scale.max() / 2 * 1.001


def test_codes_by_hand():
    """From -1 to 2 in 15 steps of .2: codes 0, 5, 15 (and 5 again for the odd one), two a byte, low one first."""
    codes, scale, low = quantize_projection(torch.tensor([[-1.0, 0.0, 2.0]]), 4)
    assert codes.tolist() == [0 | 5 << 4, 15]
    assert (scale.item(), low.item()) == (pytest.approx(0.2), -1.0)
    codes, _, _ = quantize_projection(torch.tensor([[-1.0, 0.0, 2.0]]), 8)
    assert codes.tolist() == [0, 85, 255]


def test_every_name_has_a_way_to_its_first_basis():
    assert set(projection.FIRST_BASIS) == {"svd", "randomized", "power"}
