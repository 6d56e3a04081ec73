"""SNELL against matrices written out, and what its competition leaves."""

import pytest
import torch

from hf_efficiency.adapters.snell import SNELL, mixed_kernel, soft_threshold, threshold_of
from tests.adapters.checks import base_of, count, gradcheck, randomized


def snell(d_out=6, d_in=5, r=4, sparsity=0.0, scale=0.5, norm=1):
    return SNELL(base_of(d_out, d_in), r, sparsity, scale, norm)


@pytest.mark.parametrize("norm", [1, 2])
def test_kernel_written_out(norm):
    b, a = torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    expected = torch.empty(3, 2, dtype=torch.float64)
    for i in range(3):
        for j in range(2):
            plus, minus = b[i, :2] - a[j, :2], b[i, 2:] - a[j, 2:]
            expected[i, j] = sum(abs(v) ** norm for v in plus) ** (1 / norm) - sum(abs(v) ** norm for v in minus) ** (
                1 / norm
            )
    torch.testing.assert_close(mixed_kernel(b, a, norm), expected)


def test_competition_by_hand():
    values = torch.tensor([[1.0, -4.0, 0.5], [3.0, -2.0, 6.0]])
    threshold = threshold_of(values, 0.5)  # the third smallest of six magnitudes
    assert threshold == 2
    assert torch.equal(soft_threshold(values, threshold), torch.tensor([[0.0, -2.0, 0.0], [1.0, 0.0, 4.0]]))
    assert threshold_of(values, 0.1) == 0
    assert torch.equal(soft_threshold(values, threshold_of(values, 0.1)), values)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_forward_is_that_of_the_sparse_matrix(sparsity):
    adapter = randomized(snell(20, 30, 4, sparsity))
    x = torch.randn(7, 30, dtype=torch.float64)
    dense = 0.5 * mixed_kernel(adapter.b, adapter.a, 1)
    kept = dense.abs() > dense.abs().flatten().sort().values[int(sparsity * 600) - 1]
    sparse = torch.where(kept, dense.abs() - dense.abs()[~kept].max(), 0.0) * dense.sign()
    torch.testing.assert_close(adapter(x, x, None), x @ sparse.T)
    delta = adapter.delta()
    assert (delta == 0).sum() == int(sparsity * 600)
    assert torch.linalg.matrix_rank(delta) > 4  # what the kernel is for


def test_count_and_start():
    adapter = snell(24, 16, 8, 0.9)
    assert count(adapter) == 8 * (24 + 16)
    assert not adapter.delta().any()
    adapter(torch.randn(3, 16), None, None).square().sum().add(adapter(torch.randn(3, 16), None, None).sum()).backward()
    assert all(parameter.grad.any() for parameter in adapter.parameters())  # zeros that tie all stay in the race


@pytest.mark.parametrize("norm", [1, 2])
def test_gradients(norm):
    torch.manual_seed(0)
    assert gradcheck(randomized(snell(norm=norm)), torch.randn(3, 5), torch.zeros(3, 6))


def test_gradients_under_competition():
    """The threshold is a constant: what survives has the gradient of the kernel, and the rest none."""
    values = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    threshold = threshold_of(values.detach(), 0.5) + 1e-3
    assert torch.autograd.gradcheck(lambda v: soft_threshold(v, threshold), values)
    adapter = randomized(snell(sparsity=0.5))
    x = torch.randn(3, 5, dtype=torch.float64)
    adapter(x, x, None).sum().backward()
    got = adapter.a.grad.clone()
    adapter.zero_grad()
    dense = 0.5 * mixed_kernel(adapter.b, adapter.a, 1)
    mask = (adapter.delta() != 0).double()
    ((x @ (dense * mask).T).sum()).backward()
    torch.testing.assert_close(got, adapter.a.grad)


def test_no_dense_matrix_waits_for_the_backward_pass():
    adapter, saved = snell(64, 48, 4, 0.9), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t)
    x = torch.randn(2, 48)
    with hooks:
        output = adapter(x, None, None)
    assert sum(saved) < 64 * 48
    output.sum().backward()
    assert adapter.a.grad.any()
