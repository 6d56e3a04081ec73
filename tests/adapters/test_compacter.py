"""Compacter against the dense matrices of its Kronecker sums."""

import pytest
import torch
from torch import nn

from hf_efficiency.adapters.compacter import Compacter, kronecker_product, slow_weights
from tests.adapters.checks import count, gradcheck, randomized


def dense(a, s, t, d_in, d_out):
    """sum_i A_i kron (s_i t_i), cut to (d_in, d_out)."""
    return sum(torch.kron(a[i], s[i] @ t[i]) for i in range(len(a)))[:d_in, :d_out]


def test_by_hand():
    """n = 2, r = 1, d_in = d_out = 2: A_1 the identity, A_2 the exchange, both times a number."""
    a = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    s, t = torch.tensor([[[2.0]], [[3.0]]]), torch.tensor([[[5.0]], [[7.0]]])
    product = kronecker_product(torch.tensor([[1.0, 10.0]]), a, s, t, torch.tensor([0.5, 0.25]))
    # W = 10 I + 21 exchange
    assert torch.equal(product, torch.tensor([[10 + 210 + 0.5, 21 + 100 + 0.25]]))


@pytest.mark.parametrize(
    ("d", "m", "n", "r"), [(12, 4, 4, 1), (10, 4, 3, 2), (7, 5, 5, 1), (6, 2, 1, 1), (576, 36, 7, 1)]
)
def test_like_dense_matrices(d, m, n, r):
    adapter = randomized(Compacter(d, m, n, r, slow_weights(n), "tanh", 0.0))
    hidden = torch.randn(2, 3, d, dtype=torch.float64)
    down = dense(adapter.slow, adapter.down_s, adapter.down_t, d, m)
    up = dense(adapter.slow, adapter.up_s, adapter.up_t, m, d)
    expected = torch.tanh(hidden @ down + adapter.down_bias) @ up + adapter.up_bias
    torch.testing.assert_close(adapter(hidden, hidden, None), expected)


@pytest.mark.parametrize(("d", "m", "n"), [(48, 8, 4), (48, 8, 8), (576, 36, 4), (576, 36, 12)])
def test_count_is_the_papers(d, m, n):
    """n^3 once, and r (d + m) for each of two projections (section 3.3), with biases d + m."""
    slow = slow_weights(n)
    first, second = (Compacter(d, m, n, 1, slow, "gelu", 0.0) for _ in range(2))
    assert count(second) == 2 * (d + m) + d + m
    assert count(first) == n**3 + count(second)


def test_slow_weights_are_trained_through_all_layers():
    slow = slow_weights(2)
    layers = [randomized(Compacter(6, 4, 2, 1, slow, "tanh", 0.0), seed) for seed in range(3)]
    assert [name for name, _ in nn.ModuleList(layers).named_parameters() if "slow" in name] == ["0.slow"]
    gradients = []
    for wanted in ([0], [1], [2], [0, 1, 2]):
        layers[0].slow.grad = None
        sum(layers[i].change(torch.ones(1, 6, dtype=torch.float64)).sum() for i in wanted).backward()
        gradients.append(layers[0].slow.grad)
    assert all(gradient.any() for gradient in gradients)
    torch.testing.assert_close(sum(gradients[:3]), gradients[3])


def test_starts_at_zero_at_the_scale_of_a_dense_layer():
    torch.manual_seed(0)
    adapter = Compacter(576, 36, 4, 1, slow_weights(4), "gelu", 0.0)
    hidden = torch.randn(64, 576)
    assert not adapter(hidden, hidden, None).any()
    assert 0.5 < adapter.down(hidden).std() < 2


def test_gradients():
    torch.manual_seed(0)
    assert gradcheck(randomized(Compacter(5, 3, 2, 1, slow_weights(2), "tanh", 0.0)), torch.randn(2, 5))
