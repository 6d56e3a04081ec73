"""RMSNorm and the gated MLP: the kernels against their references, and both against torch."""

import pytest
import torch
from torch.nn import functional as F

from hf_efficiency.kernels.decoder_layers import kernel, reference, rms_norm, silu_mul
from tests.kernels.harness import DTYPES, assert_close, guarded, guards_intact, poisoned

SHAPES = [(1, 1), (3, 17), (2, 1024), (5, 1025), (140, 33)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_rms_norm(n, d, dtype):
    x, g = (guarded(torch.randn(n, d).to(dtype)) for _ in range(2))
    w = guarded(torch.randn(d).to(dtype))
    with poisoned():
        y = kernel.rms_norm(x, w, 1e-5)
        grads = kernel.rms_norm_backward(g, x, w, 1e-5)
    assert_close(y, reference.rms_norm(x, w, 1e-5))
    for actual, expected in zip(grads, reference.rms_norm_backward(g, x, w, 1e-5), strict=True):
        assert_close(actual, expected)
    assert all(map(guards_intact, (x, w, g)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_silu_mul(n, d, dtype):
    gate, up, g = (guarded(torch.randn(n, d).to(dtype)) for _ in range(3))
    with poisoned():
        y = kernel.silu_mul(gate, up)
        grads = kernel.silu_mul_backward(g, gate, up)
    assert_close(y, reference.silu_mul(gate, up))
    for actual, expected in zip(grads, reference.silu_mul_backward(g, gate, up), strict=True):
        assert_close(actual, expected)
    assert all(map(guards_intact, (gate, up, g)))


def test_halves_of_one_projection_need_no_copy():
    both = torch.randn(4, 2 * 40)
    gate, up = both.chunk(2, -1)
    assert_close(kernel.silu_mul(gate, up), F.silu(gate) * up)


def test_references_follow_torch():
    """The references' gradients are written out by hand; torch's autograd is the judge."""
    x, w, g = torch.randn(4, 9, dtype=torch.double), torch.randn(9, dtype=torch.double), torch.randn(4, 9)
    x, w = x.float().requires_grad_(), w.float().requires_grad_()
    y = F.rms_norm(x, (9,), w, 1e-3)
    assert_close(reference.rms_norm(x, w, 1e-3).detach(), y.detach())
    expected = torch.autograd.grad(y, (x, w), g)
    for actual, wanted in zip(reference.rms_norm_backward(g, x.detach(), w.detach(), 1e-3), expected, strict=True):
        assert_close(actual, wanted)
    up = torch.randn(4, 9, requires_grad=True)
    y = F.silu(x) * up
    assert_close(reference.silu_mul(x, up).detach(), y.detach())
    expected = torch.autograd.grad(y, (x, up), g)
    for actual, wanted in zip(reference.silu_mul_backward(g, x.detach(), up.detach()), expected, strict=True):
        assert_close(actual, wanted)


def test_operators_are_sound():
    """Schema, fake tensors and gradients of both operators, as torch itself checks them."""
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    from hf_efficiency.kernels.decoder_layers import op

    torch.library.opcheck(op._rms_norm, (x, w, 1e-6))
    torch.library.opcheck(op._silu_mul, (x, torch.randn(3, 8, requires_grad=True)))


def test_batch_dimensions_and_gradients():
    x, w = torch.randn(2, 3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    rms_norm(x, w).sum().backward()
    silu_mul(x, x).sum().backward()
    assert x.grad.shape == x.shape
    assert w.grad.shape == w.shape


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"weight has shape \(4,\).*\(8,\)"):
        rms_norm(torch.zeros(2, 8), torch.zeros(4))
    with pytest.raises(ValueError, match=r"int64.*cast it"):
        rms_norm(torch.zeros(2, 8, dtype=torch.long), torch.zeros(8))
    with pytest.raises(ValueError, match="x lies on cpu and weight on meta"):
        rms_norm(torch.zeros(2, 8), torch.zeros(8, device="meta"))
    with pytest.raises(ValueError, match="must be alike"):
        silu_mul(torch.zeros(2, 8), torch.zeros(2, 7))
    with pytest.raises(ValueError, match="gate lies on cpu and up on meta"):
        silu_mul(torch.zeros(2, 8), torch.zeros(2, 8, device="meta"))
