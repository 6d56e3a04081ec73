"""The random subspace: its projection written out, and what makes it one."""

import pytest
import torch
from torch import nn

from hf_efficiency.adapters.intrinsic import Intrinsic, Subspace
from hf_efficiency.quantization.hadamard import hadamard_matrix, random_signs
from tests.adapters.checks import base_of, count, gradcheck, randomized


def projection(adapter, d):
    """P, (d_out d_in, d), one column at a time."""
    holder = adapter._subspace.theta.holder
    columns = []
    for i in range(d):
        holder.theta.data = torch.eye(d, dtype=torch.float64)[i]
        columns.append(adapter.delta().detach().flatten())
    return torch.stack(columns, dim=1)


def test_projection_written_out():
    """Blocks H S_k Pi H B over each other, cut to D rows and scaled."""
    d, n, rows = 6, 8, 35
    subspace = Subspace(d, 3)
    adapter = Intrinsic(base_of(5, 7), "layer", subspace, said=False)
    h = hadamard_matrix(n) / n**0.5
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    mixing = (h * random_signs(3, "intrinsic", n).double())[order]
    signs = random_signs(3, "intrinsic/layer", 5 * n).double().view(5, n)
    p = torch.cat([h @ (sign[:, None] * mixing) for sign in signs])[:rows, :d] * (n / rows) ** 0.5
    torch.testing.assert_close(projection(adapter, d), p)


@pytest.mark.parametrize(("d", "shape"), [(8, (4, 6)), (5, (4, 6)), (64, (16, 24))])
def test_columns_are_orthonormal(d, shape):
    p = projection(Intrinsic(base_of(*shape), "layer", Subspace(d, 0), said=False), d)
    torch.testing.assert_close(p.T @ p, torch.eye(d, dtype=torch.float64))


def test_columns_have_about_length_one_where_rows_are_cut():
    p = projection(Intrinsic(base_of(37, 91), "layer", Subspace(100, 0), said=False), 100)
    assert (p.norm(dim=0) - 1).abs().max() < 0.1
    assert (p.T @ p - torch.eye(100)).abs().max() < 0.2


def test_layers_and_seeds_have_projections_of_their_own():
    subspace, other = Subspace(16, 0), Subspace(16, 1)
    first, second = (Intrinsic(base_of(8, 8), name, subspace, said=False) for name in ("first", "second"))
    third = Intrinsic(base_of(8, 8), "first", other, said=False)
    again = Intrinsic(base_of(8, 8), "first", Subspace(16, 0), said=False)
    p = projection(first, 16)
    assert torch.equal(p, projection(again, 16))
    for stranger in (second, third):
        assert (projection(stranger, 16) - p).abs().max() > 0.1
    assert abs((projection(second, 16) * p).sum()) < 8  # 16 if they were one; 64 signs over 4, so a deviation of 2


@pytest.mark.parametrize("said", [False, True])
def test_count(said):
    subspace = Subspace(20, 0)
    layers = nn.ModuleList(Intrinsic(base_of(4, 6), str(i), subspace, said) for i in range(3))
    assert count(layers) == 20 + 3 * said
    stored = [name for name in layers.state_dict() if not name.endswith("scale")]
    assert stored == ["0.theta"]  # no matrices, signs or permutations


def test_forward_is_linear_in_the_numbers_and_the_factor():
    adapter = randomized(Intrinsic(base_of(6, 5), "layer", Subspace(9, 0), said=True))
    x = torch.randn(4, 5, dtype=torch.float64)
    once = adapter(x, x, None)
    torch.testing.assert_close(once, x @ adapter.delta().T)
    adapter.theta.data *= 2
    adapter.scale.data *= 3
    torch.testing.assert_close(adapter(x, x, None), 6 * once)


@pytest.mark.parametrize("said", [False, True])
def test_gradients(said):
    torch.manual_seed(0)
    adapter = randomized(Intrinsic(base_of(4, 3), "layer", Subspace(5, 0), said))
    assert gradcheck(adapter, torch.randn(2, 3), torch.zeros(2, 4))
