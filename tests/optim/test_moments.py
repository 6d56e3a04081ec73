"""The 8-bit states against the kernel's own format."""

import pytest
import torch

from hf_efficiency.kernels.galore_update.reference import dequantize, dynamic_map, quantize
from hf_efficiency.optim.moments import adam_direction_, decode, encode


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(40, 64), (7, 100), (3, 5)])
def test_codes_are_those_of_the_kernel(signed, shape):
    """But for values in the middle between two of the map, less than one in 100."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 3
    x = x if signed else x.abs()
    codes, absmax = encode(x, signed)
    expected, expected_absmax = quantize(x, signed)
    assert torch.equal(absmax, expected_absmax)
    assert (codes != expected).float().mean() < 0.01
    assert (codes.int() - expected.int()).abs().max() <= 1
    assert torch.equal(decode(expected, absmax, signed), dequantize(expected, absmax, signed))


@pytest.mark.parametrize("signed", [True, False])
def test_every_value_of_the_map_comes_back(signed):
    values = dynamic_map(signed)
    codes, absmax = encode(values, signed)
    assert codes.tolist() == list(range(256))
    assert torch.equal(decode(codes, absmax, signed), values)


def test_zeros_stay_zero():
    codes, absmax = encode(torch.zeros(300), signed=True)
    assert torch.equal(decode(codes, absmax, signed=True), torch.zeros(300))


def test_adam_by_hand():
    """Gradients 2 and 1: M = .9·.2 + .1 = .28, V = .999·.004 + .001 = .004996."""
    first, second = torch.zeros(1), torch.zeros(1)
    direction = adam_direction_(torch.tensor([2.0]), first, second, 1, (0.9, 0.999), 0.0)
    assert direction.item() == pytest.approx(1)
    direction = adam_direction_(torch.tensor([1.0]), first, second, 2, (0.9, 0.999), 0.01)
    assert (first.item(), second.item()) == (pytest.approx(0.28), pytest.approx(0.004996))
    assert direction.item() == pytest.approx((0.28 / 0.19) / ((0.004996 / 0.001999) ** 0.5 + 0.01), rel=1e-5)
