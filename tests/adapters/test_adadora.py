"""AdaLoRA's change in DoRA's direction: numbers by hand, gradients."""

import torch
from torch import tensor

from hf_efficiency.adapters.adadora import AdaDoRA
from tests.adapters.layers import adapted, base_linear, check_gradients, check_merging, random_base, randomize


def test_numbers_by_hand():
    """W = diag(3, 4), B diag(e) A twice = [[0, 4], [0, -1]]: W + delta = [[3, 4], [0, 3]], norms 5 and 3."""
    base = base_linear(tensor([[3.0, 0.0], [0.0, 4.0]]), tensor([10.0, 20.0]))
    adapter = AdaDoRA(base, r=1, scale=2.0, dropout=0.0)
    adapter.a.data, adapter.e.data = tensor([[0.0, 1.0]]), tensor([0.5])
    adapter.b.data = tensor([[4.0], [-1.0]])
    assert adapter.delta().tolist() == [[0.0, 4.0], [0.0, -1.0]]
    # The magnitudes are 3 and 4: rows (9/5, 12/5) and (0, 4).
    torch.testing.assert_close(adapted(adapter, tensor([[1.0, 1.0]]), base), tensor([[14.2, 24.0]]))


def test_starts_as_the_layer():
    base = random_base(5, 4)
    adapter = AdaDoRA(base, r=3, scale=2.0, dropout=0.0).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(adapted(adapter, x, base), x @ base.weight().T + base.bias)
    assert sum(p.numel() for p in adapter.parameters()) == 3 * (5 + 4) + 3 + 4


def test_gradients_and_merging():
    base = random_base(5, 4)
    adapter = AdaDoRA(base, r=3, scale=2.0, dropout=0.0).double()
    randomize(adapter)
    check_merging(adapter, base)
    norms = adapter._norms(base.weight())
    adapter._norms = lambda weight: norms
    check_gradients(adapter, base)


def test_pruned_to_nothing_the_magnitude_stays():
    base = random_base(5, 4)
    adapter = AdaDoRA(base, r=2, scale=1.0, dropout=0.0).double()
    adapter.keep(tensor([False, False]))
    adapter.magnitude.data *= 2
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(adapted(adapter, x, base), 2 * x @ base.weight().T + base.bias)
