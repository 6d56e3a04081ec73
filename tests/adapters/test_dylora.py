"""Nested ranks: numbers by hand at each rank, what each step trains, gradients."""

from collections import Counter

import pytest
import torch
from torch import tensor

from hf_efficiency.adapters.dylora import DyLoRA, NestedRank
from tests.adapters.layers import adapted, base_linear, check_gradients, check_merging, random_base, randomize


def build(base, r=3, *, frozen=False, leads=False, alpha=6.0):
    return DyLoRA(base, NestedRank(1, r, r), leads=leads, alpha=alpha, frozen=frozen, dropout=0.0).double()


def test_numbers_by_hand():
    """alpha = 6: at rank 1 6 * b1 a1, at rank 2 3 * (b1 a1 + b2 a2)."""
    base = base_linear(torch.zeros(2, 2))
    adapter = build(base, r=2).float()
    adapter.a.data, adapter.b.data = tensor([[1.0, 0.0], [0.0, 1.0]]), tensor([[1.0, 2.0], [1.0, 0.0]])
    x = tensor([[1.0, 10.0]])
    adapter.eval()
    adapter.rank.used = 1
    assert adapter.delta().tolist() == [[6.0, 0.0], [6.0, 0.0]]
    assert adapted(adapter, x, base).tolist() == [[6.0, 6.0]]
    adapter.rank.used = 2
    assert adapter.delta().tolist() == [[3.0, 6.0], [3.0, 0.0]]
    assert adapted(adapter, x, base).tolist() == [[63.0, 3.0]]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_trains_its_rank(k, frozen):
    """Rows of A and columns of B up to k, or k alone (algorithm 1)."""
    base = random_base(5, 4)
    adapter = build(base, frozen=frozen)
    randomize(adapter)
    adapter.rank.drawn = k
    adapted(adapter, torch.randn(3, 5, dtype=torch.float64), base).square().sum().backward()
    trained = [i == k - 1 if frozen else i < k for i in range(3)]
    assert adapter.a.grad.any(1).tolist() == trained
    assert adapter.b.grad.any(0).tolist() == trained


def test_ranks_are_drawn_evenly_by_the_leading_layer_alone():
    torch.manual_seed(0)
    base = random_base(5, 4)
    rank = NestedRank(2, 5, 5)
    leader, follower = (
        DyLoRA(base, rank, leads=leads, alpha=1.0, frozen=False, dropout=0.0).double() for leads in (True, False)
    )
    x = torch.randn(1, 5, dtype=torch.float64)
    counts = Counter()
    for _ in range(400):
        adapted(leader, x, base)
        drawn = rank.drawn
        adapted(follower, x, base)
        assert rank.drawn == drawn
        counts[drawn] += 1
    assert set(counts) == {2, 3, 4, 5}
    assert min(counts.values()) > 60
    leader.eval()
    state = torch.get_rng_state()
    adapted(leader, x, base)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("k", [1, 3])
def test_gradients_and_merging(k):
    base = random_base(5, 4)
    adapter = build(base)
    randomize(adapter)
    adapter.rank.drawn = k
    check_gradients(adapter, base)
    adapter.eval()
    adapter.rank.used = k
    check_merging(adapter, base)


def test_truncated_adapter_is_the_adapter_at_that_rank():
    base = random_base(5, 4)
    adapter = build(base).eval()
    randomize(adapter)
    adapter.rank.used = 2
    before = adapter.delta()
    adapter.truncate(2)
    assert torch.equal(adapter.delta(), before)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * (5 + 4)
