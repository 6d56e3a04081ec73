"""Bottleneck adapters by hand, and their gradients."""

import pytest
import torch

from hf_efficiency.adapters.bottleneck import ACTIVATIONS, Bottleneck, ParallelBottleneck, SublayerInput
from tests.adapters.checks import count, gradcheck, randomized


def by_hand(kind, *extra, scale=1.0):
    """d = 2, m = 1: down (1, -2) + 3, up (4, 5) + (6, 7)."""
    adapter = kind(*extra, 2, 1, "relu", 0.0, scale, False)
    adapter.down_weight.data = torch.tensor([[1.0, -2.0]])
    adapter.down_bias.data = torch.tensor([3.0])
    adapter.up_weight.data = torch.tensor([[4.0], [5.0]])
    adapter.up_bias.data = torch.tensor([6.0, 7.0])
    return adapter


def test_by_hand():
    adapter = by_hand(Bottleneck, scale=2.0)
    output = torch.tensor([[1.0, 1.0], [0.0, 9.0]])
    # relu(1 - 2 + 3) = 2 and relu(0 - 18 + 3) = 0
    expected = 2 * torch.tensor([[4 * 2 + 6.0, 5 * 2 + 7.0], [6.0, 7.0]])
    assert torch.equal(adapter(torch.full((2, 5), 99.0), output, None), expected)


def test_parallel_reads_what_the_sublayer_read():
    source = SublayerInput()
    adapter = by_hand(ParallelBottleneck, source)
    assert source(torch.tensor([[1.0, 1.0]]), torch.zeros(1, 7), None) == 0
    assert torch.equal(adapter(torch.zeros(1, 5), torch.full((1, 2), 9.0), None), torch.tensor([[14.0, 17.0]]))
    with pytest.raises(RuntimeError, match="before the first linear layer of its sub-layer"):
        adapter(torch.zeros(1, 5), torch.full((1, 2), 9.0), None)
    assert list(adapter.state_dict()) == ["down_weight", "down_bias", "up_weight", "up_bias"]


def test_starts_at_zero_with_the_papers_count():
    adapter = Bottleneck(24, 6, "gelu", 0.0, 1.0, False)
    assert count(adapter) == 2 * 6 * 24 + 24 + 6
    assert not adapter(torch.zeros(3, 5), torch.randn(3, 24), None).any()
    assert count(Bottleneck(24, 6, "gelu", 0.0, 1.0, True)) == 2 * 6 * 24 + 24 + 6 + 1


def test_dropout_only_while_training():
    adapter = Bottleneck(4, 64, "tanh", 0.5, 1.0, False)
    adapter.up_weight.data.normal_()
    h = torch.randn(2, 4)
    assert not torch.equal(adapter.train().change(h), adapter.change(h))
    assert torch.equal(adapter.eval().change(h), adapter.change(h))


@pytest.mark.parametrize("non_linearity", ACTIVATIONS)
def test_gradients(non_linearity):
    torch.manual_seed(0)
    assert gradcheck(randomized(Bottleneck(5, 3, non_linearity, 0.0, 4.0, True)), torch.randn(2, 5))
