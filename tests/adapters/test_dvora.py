"""VeRA in DoRA's direction: numbers by hand, gradients, and the frozen matrices."""

import math

import pytest
import torch
from torch import tensor

from hf_efficiency.adapters.base import FrozenMatrix
from hf_efficiency.adapters.dvora import DVoRA, projections
from tests.adapters.layers import adapted, base_linear, check_gradients, check_merging, random_base, randomize


def fixed(values):
    return FrozenMatrix(tuple(values.shape), 0, lambda target, generator: target.copy_(values))


def build(base, r=3, seed=0):
    adapter = DVoRA(base, projections(r, base.in_features, base.out_features, seed), r, d_initial=0.1, dropout=0.0)
    return adapter.double()


def test_numbers_by_hand():
    """W = diag(3, 4), A = (1 1), B = (1 2)^T, d = 2, b = (1, 0.5): delta is 2 in all four places."""
    base = base_linear(tensor([[3.0, 0.0], [0.0, 4.0]]), tensor([10.0, 20.0]))
    shared = (fixed(tensor([[1.0, 1.0]])), fixed(tensor([[1.0], [2.0]])))
    adapter = DVoRA(base, shared, r=1, d_initial=2.0, dropout=0.0)
    assert adapter.magnitude.tolist() == [3.0, 4.0]
    adapter.b.data = tensor([1.0, 0.5])
    assert adapter.delta().tolist() == [[2.0, 2.0], [2.0, 2.0]]
    # W + delta = [[5, 2], [2, 6]], norms sqrt(29) and sqrt(40).
    adapter.magnitude.data = tensor([29.0, 40.0]).sqrt() * 2
    torch.testing.assert_close(adapter.merged_weight(base.weight()), tensor([[10.0, 4.0], [4.0, 12.0]]))
    # x = (1, -1): 10 - 4 + 10, 4 - 12 + 20; the bias is not scaled.
    torch.testing.assert_close(adapted(adapter, tensor([[1.0, -1.0]]), base), tensor([[16.0, 12.0]]))


def test_starts_as_the_layer():
    base = random_base(5, 4)
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(adapted(build(base), x, base), x @ base.weight().T + base.bias)


def test_gradients():
    """The norm is a constant of the backward pass (DoRA, section 4.3), so it is one of the finite differences too."""
    base = random_base(5, 4)
    adapter = build(base)
    randomize(adapter)
    norms = adapter._norms(base.weight())
    adapter._norms = lambda weight: norms
    check_gradients(adapter, base)


def test_norm_counts_as_a_constant():
    base = random_base(5, 4, bias=False)
    adapter = build(base)
    randomize(adapter)
    x = torch.randn(3, 5, dtype=torch.float64)
    weight = base.weight() + adapter.delta()
    norms = weight.norm(dim=1).detach()
    by_hand = torch.autograd.grad(((x @ weight.T) * adapter.magnitude / norms).sum(), adapter.parameters())
    ours = torch.autograd.grad(adapted(adapter, x, base).sum(), adapter.parameters())
    for a, b in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(a, b)


def test_merging():
    base = random_base(5, 4)
    adapter = build(base)
    randomize(adapter)
    check_merging(adapter, base)


def test_trained_numbers():
    """r + d_out of VeRA (Kopiczko et al. 2024, table 1) and d_out of the magnitude."""
    base = random_base(7, 5)
    assert sum(p.numel() for p in build(base, r=3).parameters()) == (3 + 5) + 5


def test_shared_matrices():
    """Both are uniform with variance 2 / fan-in; smaller layers see a corner; the seed gives them again."""
    a, b = projections(64, 400, 300, seed=3)
    like = torch.empty(0)
    assert a.on(like).std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    assert b.on(like).std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.02)
    assert torch.equal(projections(64, 400, 300, seed=3)[0].on(like), a.on(like))
    assert not torch.equal(projections(64, 400, 300, seed=4)[0].on(like), a.on(like))
    small = DVoRA(random_base(20, 10), (a, b), r=64, d_initial=0.1, dropout=0.0)
    rows, columns = small._matrices()
    assert torch.equal(rows, a.on(like)[:, :20])
    assert torch.equal(columns, b.on(like)[:10])
