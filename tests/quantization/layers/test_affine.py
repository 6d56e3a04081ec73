"""The affine storage layer: every path against s (q - z), gradients, dtypes, copies, compilation."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_efficiency.quantization.compressed_tensors import PackQuantizedLayout
from hf_efficiency.quantization.formats import AffineTensors, default_g_idx, group_count
from hf_efficiency.quantization.layers import base
from hf_efficiency.quantization.layers.affine import AffineLinear


def tensors(in_features, out_features, bits, group_size, permuted=False, sym=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(in_features, group_size)
    top = (1 << bits) - 1
    zeros = torch.randint(1, top + 1, (out_features, groups), generator=generator, dtype=torch.int32)
    g_idx = default_g_idx(in_features, group_size)
    return AffineTensors(
        torch.randint(0, top + 1, (out_features, in_features), generator=generator, dtype=torch.uint8),
        (torch.rand(out_features, groups, generator=generator) + 0.5).mul(0.02).bfloat16().float(),
        torch.full_like(zeros, 1 << (bits - 1)) if sym else zeros,
        g_idx[torch.randperm(in_features, generator=generator)] if permuted else g_idx,
    )


def filled(in_features=64, out_features=32, bits=4, group_size=32, permuted=False, sym=False, **kwargs):
    layer = AffineLinear(in_features, out_features, bits=bits, group_size=group_size, **kwargs)
    layer.pack(tensors(in_features, out_features, bits, group_size, permuted, sym))
    if layer.bias is not None:
        layer.bias.data.copy_(torch.arange(out_features))
    return layer


def exact(layer):
    """s (q - z) in float64, written out."""
    plain = layer.unpack()
    index = plain.g_idx.long()
    return plain.scales.double()[:, index] * (plain.codes.double() - plain.zeros.double()[:, index])


def inputs(rows, columns, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@settings(max_examples=80, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 1, 8, 32, 48, 128]),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    permuted=st.booleans(),
    prepared=st.booleans(),
)
def test_dequantize_is_the_formula(bits, group_size, sizes, permuted, prepared):
    layer = filled(32 * sizes[0], 32 * sizes[1], bits, group_size, permuted)
    if prepared:
        layer.prepare()
    assert torch.equal(layer.dequantize(), exact(layer).float())
    assert torch.equal(layer.dequantize_rows(3, 7), layer.dequantize()[3:7])


@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_a_linear_layer(rows, bias):
    layer = filled(bias=bias)
    x = inputs(rows, 64).view(rows, 1, 64)
    expected = x.double() @ exact(layer).T + (torch.arange(32) if bias else 0)
    y = layer(x)
    assert (y.shape, y.dtype) == ((rows, 1, 32), torch.float32)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert layer(x[:0]).shape == (0, 1, 32)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 256, -1])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("in_features", [256, 576])
def test_int4_product_equals_the_decoded_one(bits, group_size, permuted, in_features):
    """With a ragged last group (576 in groups of 128 or 256, 256 in groups of 96) and without."""
    layer = filled(in_features, 48 if bits != 3 else 64, bits, group_size, permuted, compute_dtype=torch.bfloat16)
    x = inputs(7, in_features, torch.bfloat16)
    assert layer._int4 is None
    slow = layer(x)
    layer.prepare()
    assert layer._int4 is not None
    expected = x.double() @ exact(layer).T
    assert relative(layer(x), expected) < 6e-3
    assert relative(slow, expected) < 6e-3
    assert torch.equal(layer(x)[:1], layer(x[:1]))


@pytest.mark.parametrize(("bits", "sym"), [(2, False), (3, False), (4, True)])
def test_int4_product_is_exact_where_zero_can_be_moved_to_8(bits, sym):
    """Inputs that are powers of two leave nothing to round but the result."""
    layer = filled(64, 32, bits, 32, sym=sym, compute_dtype=torch.bfloat16)
    layer.prepare()
    expected = exact(layer).T.float().bfloat16()
    assert torch.equal(layer(torch.eye(64, dtype=torch.bfloat16)), expected)


@pytest.mark.parametrize(
    ("in_features", "out_features", "bits", "group_size"),
    [(192, 32, 4, 48), (64, 24, 4, 32), (64, 32, 8, 32), (64, 32, 4, 16)],
)
def test_shapes_that_the_int4_product_does_not_take(in_features, out_features, bits, group_size):
    layer = filled(in_features, out_features, bits, group_size, compute_dtype=torch.bfloat16)
    layer.prepare()
    assert layer._int4 is None
    x = inputs(3, in_features, torch.bfloat16)
    assert relative(layer(x), x.double() @ exact(layer).T) < 6e-3


def test_uneven_permuted_groups_are_decoded():
    """A foreign g_idx may fill groups unevenly."""
    plain = tensors(64, 32, 4, 32)
    plain.g_idx = torch.tensor([0] * 30 + [1] * 34, dtype=torch.int32)
    layer = AffineLinear(64, 32, bits=4, group_size=32, compute_dtype=torch.bfloat16)
    layer.pack(plain)
    layer.prepare()
    assert layer._int4 is None
    assert torch.equal(layer.dequantize(), exact(layer).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_of_every_dtype(dtype):
    layer = filled(128, 64, compute_dtype=dtype, bias=True)
    layer.prepare()
    x = inputs(4, 128, dtype)
    y = layer(x)
    assert y.dtype == dtype
    expected = x.double() @ exact(layer).T + torch.arange(64)
    assert relative(y, expected) < 3 * torch.finfo(dtype).eps


def test_dtype_of_the_input_may_differ():
    """Autocast and PEFT hand over other dtypes than the layer's own."""
    layer = filled(compute_dtype=torch.bfloat16)
    layer.prepare()
    y = layer(inputs(3, 64))
    assert y.dtype == torch.float32
    assert relative(y, inputs(3, 64).double() @ exact(layer).T) < 6e-3


def test_blocked_forward_equals_the_whole(monkeypatch):
    layer = filled(64, 96)
    x = inputs(2, 64)
    whole = layer(x)
    monkeypatch.setattr(base, "BLOCK_ELEMENTS", 64 * 7)
    torch.testing.assert_close(layer(x), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gradient_of_the_input(dtype, bits):
    layer = filled(64, 32, bits, compute_dtype=dtype, bias=True)
    layer.prepare()
    x = inputs(6, 64, dtype).view(2, 3, 64).requires_grad_()
    grad = inputs(6, 32, dtype).view(2, 3, 32)
    layer(x).backward(grad)
    expected = grad.double() @ layer.dequantize().double()
    assert x.grad.dtype == dtype
    assert relative(x.grad, expected) < 2 * torch.finfo(dtype).eps
    assert layer.bias.grad is None
    if dtype == torch.float32:
        double = copy.deepcopy(layer)
        double.compute_dtype = torch.float64
        assert torch.autograd.gradcheck(double, inputs(2, 64).double().requires_grad_())


def test_graph_keeps_no_dense_weight():
    layer = filled(256, 256)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        layer(inputs(2, 256).requires_grad_())
    assert sum(saved) < 256 * 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", [False, True])
def test_compiles_without_graph_breaks(dtype, gradient):
    layer = filled(compute_dtype=dtype, bias=True)
    layer.prepare()
    x = inputs(3, 64, dtype).requires_grad_(gradient)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))
    if gradient:
        compiled(x).sum().backward()
        assert x.grad is not None


def test_cast_changes_what_is_computed_and_not_what_is_stored():
    layer = filled(128, 64, bias=True)
    layer.prepare()
    stored = {name: t.clone() for name, t in layer.state_dict().items() if name != "bias"}
    layer.to(torch.bfloat16)
    assert layer.compute_dtype == layer.bias.dtype == layer.dequantize().dtype == torch.bfloat16
    for name, tensor in stored.items():
        assert layer.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(layer.state_dict()[name], tensor)
    assert layer._int4 is not None
    layer.to(torch.float32)
    assert layer.compute_dtype == layer.bias.dtype == torch.float32
    assert layer._int4 is None
    assert torch.equal(layer.dequantize(), exact(layer).float())


def test_new_tensors_replace_what_was_prepared():
    layer, other = filled(compute_dtype=torch.bfloat16), filled(compute_dtype=torch.bfloat16)
    other.pack(tensors(64, 32, 4, 32, permuted=True, seed=5))
    layer.prepare()
    other.prepare()
    x = inputs(3, 64, torch.bfloat16)
    assert not torch.equal(layer(x), other(x))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert torch.equal(layer.dequantize(), other.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies(dtype):
    layer = filled(compute_dtype=dtype, bias=True)
    layer.prepare()
    x = inputs(3, 64, dtype)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    again = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)]
    assert all(torch.equal(each(x), layer(x)) for each in again)
    again[0].qweight.zero_()
    assert layer.qweight.any()


def test_what_hosts_ask_for():
    layer = filled(bits=3, bias=True, compute_dtype=torch.bfloat16)
    assert isinstance(layer, torch.nn.Linear)
    assert layer.W_q is layer.weight is layer.qweight
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert set(layer.state_dict()) == {"qweight", "qzeros", "scales", "g_idx", "bias"}
    assert "bits=3, group_size=32, layout='gptq'" in repr(layer)
    with pytest.raises(RuntimeError):
        layer.weight.data += torch.ones(32, 64)  # a merge that does not decode must fail


def test_declared_tensors_on_meta():
    layer = AffineLinear(64, 32, bits=4, group_size=32, device="meta", compute_dtype=torch.bfloat16)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    layer.prepare()
    assert layer._int4 is None


def test_pack_quantized_layout():
    layer = filled(64, 32, 4, 32, layout=PackQuantizedLayout(group_size=32), compute_dtype=torch.bfloat16)
    layer.prepare()
    assert layer._int4 is not None
    x = inputs(3, 64, torch.bfloat16)
    assert relative(layer(x), x.double() @ exact(layer).T) < 6e-3


def test_layout_is_checked():
    with pytest.raises(ValueError, match="no ragged last group: in_features=576 is no multiple of group_size=128"):
        AffineLinear(576, 64, bits=4, group_size=128, layout="awq")
