"""Gated low ranks: numbers by hand, the proximal step, gradients."""

import pytest
import torch
from torch import tensor

from hf_efficiency.adapters.sora import SoRA
from tests.adapters.layers import adapted, base_linear, check_gradients, check_merging, random_base, randomize


def test_numbers_by_hand():
    """delta = 2 * B diag(g) A with one gate closed."""
    base = base_linear(torch.zeros(2, 2), tensor([1.0, 1.0]))
    adapter = SoRA(base, r=2, scale=2.0, dropout=0.0)
    adapter.a.data = tensor([[1.0, 2.0], [5.0, 5.0]])
    adapter.b.data = tensor([[1.0, 7.0], [3.0, 7.0]])
    adapter.gates.data = tensor([0.5, 0.0])
    assert adapter.delta().tolist() == [[1.0, 2.0], [3.0, 6.0]]
    assert adapted(adapter, tensor([[1.0, 1.0]]), base).tolist() == [[4.0, 10.0]]


def test_proximal_step():
    """T(x) = sign(x) max(|x| - threshold, 0) (equation 6)."""
    adapter = SoRA(random_base(4, 4), r=4, scale=1.0, dropout=0.0)
    adapter.gates.data = tensor([1.0, -1.0, 0.2, -0.25])
    adapter.proximal_step(0.25)
    assert adapter.gates.tolist() == [0.75, -0.75, 0.0, 0.0]


@pytest.mark.parametrize("rank", [1, 3])
def test_gradients_and_merging(rank):
    base = random_base(5, 4)
    adapter = SoRA(base, rank, scale=1.5, dropout=0.0).double()
    randomize(adapter)
    check_gradients(adapter, base)
    check_merging(adapter, base)


def test_starts_as_the_layer_and_with_lora_parameters():
    torch.manual_seed(0)
    base = random_base(400, 300)
    adapter = SoRA(base, r=64, scale=1.0, dropout=0.0)
    assert not adapter.delta().any()
    assert adapter.a.abs().max().item() == pytest.approx(1 / 20, rel=0.01)
    assert adapter.gates.std().item() == pytest.approx(1, abs=0.3)
    assert sum(p.numel() for p in adapter.parameters()) == 64 * (400 + 300) + 64


def test_pruned_directions_change_nothing():
    base = random_base(5, 4)
    adapter = SoRA(base, r=3, scale=1.5, dropout=0.0).double()
    randomize(adapter)
    adapter.gates.data[1] = 0
    before, parameters = adapter.delta(), list(adapter.parameters())
    adapter.keep(adapter.gates != 0)
    torch.testing.assert_close(adapter.delta(), before)
    assert [p.numel() for p in parameters] == [2 * 5, 2, 4 * 2]


def test_layer_without_any_rank():
    base = random_base(5, 4)
    adapter = SoRA(base, r=2, scale=1.0, dropout=0.0).double()
    adapter.keep(tensor([False, False]))
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(adapted(adapter, x, base), x @ base.weight().T + base.bias)
    adapted(adapter, x, base).sum().backward()
    check_merging(adapter, base)
