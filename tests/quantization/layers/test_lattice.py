"""The storage layer of QuIP#: what it declares, decodes and multiplies."""

import pickle

import pytest
import torch

from hf_efficiency.quantization.e8p import CODEBOOKS
from hf_efficiency.quantization.hadamard import hadamard_matrix
from hf_efficiency.quantization.layers import lattice
from hf_efficiency.quantization.layers.lattice import LatticeLinear, signs


def filled(in_features=24, out_features=12, bits=2, tuned=False, **kwargs):
    """A layer with random codes, so that all of them are tried."""
    layer = LatticeLinear(in_features, out_features, bits=bits, tuned=tuned, **kwargs)
    generator = torch.Generator().manual_seed(bits)
    for codes in layer.stages():
        info = torch.iinfo(codes.dtype)
        codes.copy_(torch.randint(info.min, info.max + 1, codes.shape, generator=generator).to(codes.dtype))
    layer.scale.fill_(0.03)
    if tuned:
        layer.su.copy_(torch.randn(out_features, generator=generator))
        layer.sv.copy_(torch.randn(in_features, generator=generator))
    else:
        layer.seed.fill_(1234)
    if layer.bias is not None:
        layer.bias.data.normal_(generator=generator)
    return layer


@pytest.mark.parametrize(("bits", "tuned"), [(2, False), (3, False), (4, True)])
def test_declares_bits_per_weight(bits, tuned):
    layer = filled(64, 32, bits, tuned)
    stored = layer.state_dict()
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == layer.declare()
    size = sum(t.numel() * t.element_size() for t in stored.values())
    assert size == 64 * 32 * bits // 8 + 4 + (2 * (64 + 32) if tuned else 8)
    assert layer.W_q is layer.codes


def test_dequantize_is_the_formula():
    layer = filled(24, 12, 3)
    su, sv = signs(1234, 24, 12)
    rotated = CODEBOOKS[3].decode(layer.stages())
    left, right = hadamard_matrix(12).float() / 12**0.5, hadamard_matrix(24).float() / 24**0.5
    expected = su[:, None] * (left.T @ rotated @ right) * sv * 0.03
    torch.testing.assert_close(layer.dequantize(), expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize(("in_features", "out_features"), [(24, 12), (22, 13), (72, 5)])
@pytest.mark.parametrize("rows", [1, 100])
def test_forward_equals_dequantize(bits, tuned, in_features, out_features, rows):
    layer = filled(in_features, out_features, bits, tuned, bias=True)
    x = torch.randn(rows, 1, in_features, generator=torch.Generator().manual_seed(0))
    expected = x @ layer.dequantize().T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    layer = filled(96, 48, 4, compute_dtype=dtype)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double() @ layer.dequantize().double().T
    y = layer(x)
    assert (y.dtype, layer.dequantize().dtype) == (dtype, dtype)
    assert (y.double() - exact).norm() < 4 * torch.finfo(dtype).eps * exact.norm()


def test_blocked_forward_equals_the_whole(monkeypatch):
    layer = filled(64, 48)
    x = torch.randn(2, 64)
    whole = layer(x)
    monkeypatch.setattr(lattice, "_CPU_BLOCK_ELEMENTS", 64 * 7)
    torch.testing.assert_close(layer(x), whole)


@pytest.mark.parametrize("rows", [2, 200])
def test_gradient_reaches_the_input(rows):
    layer = filled(24, 12, 4)
    x = torch.randn(rows, 24, requires_grad=True)
    y = layer(x)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(rows, -1), rtol=1e-4, atol=1e-5)


def test_signs_follow_a_loaded_seed():
    first, second = filled(), filled()
    second.seed.fill_(99)
    second(torch.randn(1, 24))  # the signs of 99 are known now
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.dequantize(), second.dequantize())
    second._buffers["seed"] = torch.tensor(99)
    assert not torch.equal(first.dequantize(), second.dequantize())


def test_casting_the_model_keeps_scale_and_vectors():
    layer = filled(24, 12, tuned=True, bias=True).to(torch.bfloat16)
    assert (layer.scale.dtype, layer.su.dtype, layer.sv.dtype) == (torch.float32, torch.float16, torch.float16)
    assert (layer.bias.dtype, layer.compute_dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(layer.scale, torch.tensor(0.03))


def test_built_on_meta_and_pickled():
    layer = LatticeLinear(24, 12, bits=2, device="meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    full = filled()
    full(torch.randn(1, 24))
    again = pickle.loads(pickle.dumps(full))
    assert torch.equal(again.dequantize(), full.dequantize())


def test_rejects_other_widths():
    with pytest.raises(ValueError, match="bits=5 has no lattice codebook: choose one of 2, 3, 4"):
        LatticeLinear(8, 8, bits=5)


def on_kernels(layer):
    """The same layer, multiplied by its kernels (here under Triton's interpreter)."""
    layer.kernel_devices = frozenset({"cpu"})
    layer.prepare()
    return layer


@pytest.mark.parametrize(("tuned", "dtype"), [(False, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16)])
@pytest.mark.parametrize("bits", [2, 3, 4])
# Bases on both sides, powers of two, padding, and lengths that only the Hartley transform rotates (13).
@pytest.mark.parametrize(("in_features", "out_features"), [(24, 96), (22, 13), (40, 64)])
def test_kernels_equal_the_plain_path(in_features, out_features, bits, tuned, dtype):
    plain, fast = (filled(in_features, out_features, bits, tuned, bias=True, compute_dtype=dtype) for _ in range(2))
    on_kernels(fast)
    for rows in (1, 3):
        x = torch.randn(rows, 1, in_features, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        y, expected = fast(x), plain(x)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        (grad,), (expected_grad,) = torch.autograd.grad(y, x, g), torch.autograd.grad(expected, x, g)
        for actual, wanted in ((y, expected), (grad, expected_grad)):
            assert actual.dtype == dtype
            assert (actual - wanted).norm() < (1e-6 if dtype == torch.float32 else 1.5e-2) * wanted.norm()


def test_kernels_see_what_was_written_to_the_layer():
    layer = on_kernels(filled(24, 12, tuned=True))
    x = torch.randn(2, 24)
    before = layer(x)
    layer.su.mul_(2)
    layer.scale.mul_(2)
    torch.testing.assert_close(layer(x), 4 * before)
    layer.load_state_dict(filled(24, 12, tuned=True).state_dict())
    torch.testing.assert_close(layer(x), before)
    with torch.inference_mode():
        torch.testing.assert_close(on_kernels(filled(24, 12, tuned=True))(x), before)


def test_kernels_compile_without_a_break():
    layer = on_kernels(filled(24, 12, 3, bias=True))
    x = torch.randn(2, 24)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_other_dtypes_take_the_plain_path():
    layer = on_kernels(filled(24, 12))
    assert layer.kernel_forward(torch.zeros(1, 24, dtype=torch.double)) is None
