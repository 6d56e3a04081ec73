"""Statistics of a layer's input against their definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_efficiency.calibration.statistics import InputStatistics

BOTH = frozenset({"hessian", "abs_mean"})
CPU = torch.device("cpu")


def test_worked_by_hand():
    """Rows (1, 2) and (3, -4): mean x xᵀ is ((1 + 9) / 2, (2 - 12) / 2; ..., (4 + 16) / 2)."""
    statistics = InputStatistics(2, BOTH, CPU)
    statistics.add(torch.tensor([[1.0, 2.0]]))
    statistics.add(torch.tensor([[[3.0, -4.0]]]))
    assert statistics.hessian().tolist() == [[5, -5], [-5, 10]]
    assert statistics.abs_mean().tolist() == [2, 3]


@settings(max_examples=30, deadline=None)
@given(features=st.integers(1, 600), cuts=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_equals_one_product_however_the_rows_are_cut(features, cuts, seed):
    x = torch.randn(sum(cuts), features, generator=torch.Generator().manual_seed(seed))
    statistics = InputStatistics(features, BOTH, CPU)
    for part in x.split(cuts):
        statistics.add(part)
    exact = x.double()
    hessian = statistics.hessian()
    assert torch.equal(hessian, hessian.T)
    torch.testing.assert_close(hessian.double(), exact.T @ exact / len(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics.abs_mean().double(), exact.abs().mean(0), rtol=1e-5, atol=1e-6)


def test_half_precision_is_summed_in_float32():
    x = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)  # a bfloat16 sum would stop at 256
    statistics = InputStatistics(1, BOTH, CPU)
    statistics.add(x)
    assert statistics.hessian().item() == statistics.abs_mean().item() == 1


def test_only_what_was_asked_for():
    statistics = InputStatistics(2, frozenset({"abs_mean"}), CPU)
    statistics.add(torch.ones(1, 2))
    with pytest.raises(ValueError, match="No input reached this layer"):
        statistics.hessian()
    assert InputStatistics(2, frozenset({"hessian"}), CPU).abs_mean() is None


def test_no_input():
    with pytest.raises(ValueError, match="No input reached this layer, so it has no Hessian"):
        InputStatistics(2, BOTH, CPU).hessian()
