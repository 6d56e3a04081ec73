"""Products with packed weights: the kernels against the definition, by way of `formats.py`, and the storage layer."""

import pytest
import torch

from hf_efficiency.kernels.quant_linear import awq_linear, gptq_linear, kernel, op, reference
from hf_efficiency.quantization.compressed_tensors import PackQuantizedLayout
from hf_efficiency.quantization.formats import LAYOUTS, AffineTensors, default_g_idx, group_count
from hf_efficiency.quantization.layers.affine import AffineLinear
from tests.kernels.harness import DTYPES, assert_close, guarded, guards_intact, poisoned

BITS = (2, 3, 4, 8)
# The interpreter cuts float32 to bfloat16 where a GPU rounds: twice the error, for each weight as for the result.
TOLERANCES = {torch.bfloat16: 3e-2}
# d_in, d_out, group size, permuted: full groups; a ragged last group; one group, several programs; groups that tiles
# cross; and groups out of order.
SHAPES = [(96, 32, 32, False), (96, 64, 64, False), (160, 288, -1, False), (96, 32, 24, False), (64, 32, 32, True)]


def plain(bits, d_in, d_out, group_size, permuted=False):
    """Random codes, scales, zero points of 1 to 2^bits - 1, and g_idx."""
    generator = torch.Generator().manual_seed(d_in + d_out + bits)
    groups = group_count(d_in, group_size)
    index = default_g_idx(d_in, group_size)
    if permuted:
        index = index[torch.randperm(d_in, generator=generator)]
    codes = torch.randint(0, 1 << bits, (d_out, d_in), generator=generator).to(torch.uint8)
    zeros = torch.randint(1, 1 << bits, (d_out, groups), generator=generator).int()
    scales = (torch.rand(d_out, groups, generator=generator) + 0.5).half().float()
    return AffineTensors(codes, scales, zeros, index)


def dense(t):
    """(d_out, d_in) float32, from the definition w = s (q - z)."""
    index = t.g_idx.long()
    return t.scales[:, index] * (t.codes.float() - t.zeros.float()[:, index])


def gptq_args(t, bits, offset=1, permuted=False):
    stored = LAYOUTS["gptq" if offset else "gptq_v2"].pack(t, bits)
    names = ["qweight", "qzeros", "scales"] + ["g_idx"] * permuted
    return [guarded(stored[name]) for name in names] + [None] * (not permuted)


def awq_args(t):
    return [guarded(value) for value in LAYOUTS["awq"].pack(t, 4).values()]


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float32, shape) for shape in SHAPES] + [(dtype, SHAPES[i]) for dtype in DTYPES[1:] for i in (0, 1, 4)],
)
@pytest.mark.parametrize("bits", BITS)
def test_gptq(bits, shape, dtype):
    d_in, d_out, group_size, permuted = shape
    t = plain(bits, *shape)
    args = gptq_args(t, bits, permuted=permuted)
    for n in (2, 5) if dtype == torch.float16 else (1, 5):
        x, grad = guarded(torch.randn(n, d_in).to(dtype)), guarded(torch.randn(n, d_out).to(dtype))
        bias = guarded(torch.randn(d_out))
        with poisoned():
            y = kernel.gptq_linear(x, *args, bias, bits, group_size, 1)
            grad_x = kernel.gptq_linear_backward(grad, *args, bits, group_size, 1)
        w = dense(t).to(dtype).float()
        assert_close(y, (x.float() @ w.T + bias).to(dtype), TOLERANCES.get(dtype))
        assert_close(grad_x, (grad.float() @ w).to(dtype), TOLERANCES.get(dtype))
        assert all(guards_intact(t) for t in (x, grad, bias, *args) if t is not None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_in", "d_out", "group_size"), [(96, 40, 32), (40, 264, -1), (30, 16, 15)])
def test_awq(d_in, d_out, group_size, dtype):
    t = plain(4, d_in, d_out, group_size)
    args = awq_args(t)
    for n in (1, 2, 5):
        x, grad = guarded(torch.randn(n, d_in).to(dtype)), guarded(torch.randn(n, d_out).to(dtype))
        bias = guarded(torch.randn(d_out))
        with poisoned():
            y = kernel.awq_linear(x, *args, bias, group_size)
            grad_x = kernel.awq_linear_backward(grad, *args, group_size)
        w = dense(t).to(dtype).float()
        assert_close(y, (x.float() @ w.T + bias).to(dtype), TOLERANCES.get(dtype))
        assert_close(grad_x, (grad.float() @ w).to(dtype), TOLERANCES.get(dtype))
        assert all(map(guards_intact, (x, grad, bias, *args)))


@pytest.mark.parametrize("n", [17, 40, 70, 130])
def test_every_size_of_tile(n):
    t = plain(4, 64, 32, 32)
    args = gptq_args(t, 4)
    x, grad = torch.randn(n, 64).bfloat16(), torch.randn(n, 32).bfloat16()
    w = dense(t).bfloat16().float()
    with poisoned():
        assert_close(kernel.gptq_linear(x, *args, None, 4, 32, 1), (x.float() @ w.T).bfloat16(), 3e-2)
        assert_close(kernel.gptq_linear_backward(grad, *args, 4, 32, 1), (grad.float() @ w).bfloat16(), 3e-2)


@pytest.mark.parametrize("n", [1, 5])
def test_a_sum_of_many_steps(n):
    """More steps than programs share: each takes several, the last less than a whole one."""
    t = plain(4, 2080, 8, 32)
    x = torch.randn(n, 2080)
    for wanted in (1, 2):
        parts, steps = kernel._splits(1, 17, wanted)
        assert parts * steps >= 17 > (parts - 1) * steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_MULTIPROCESSORS", 1)
        y = kernel.gptq_linear(x, *gptq_args(t, 4), None, 4, 32, 1)
        again = kernel.gptq_linear(x, *gptq_args(t, 4), None, 4, 32, 1)
    assert_close(y, x @ dense(t).T)
    assert torch.equal(y, again)


@pytest.mark.parametrize("bits", BITS)
def test_references_follow_the_definition(bits):
    for offset in (0, 1):
        for d_in, d_out, group_size, permuted in SHAPES:
            t = plain(bits, d_in, d_out, group_size, permuted)
            args = gptq_args(t, bits, offset, permuted)
            assert torch.equal(reference.gptq_weight(*args, bits, group_size, offset).T, dense(t))
    t = plain(4, 30, 16, 15)
    assert torch.equal(reference.awq_weight(*awq_args(t), 15).T, dense(t))


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("bits", BITS)
def test_zero_points_that_borrow(bits, n):
    """A zero point of 0 in version 1: what is subtracted from its word borrows from the next one (not at 3 bits)."""
    t = plain(bits, 32, 32, 32)
    t.zeros[::3] = 0
    x = torch.randn(n, 32)
    assert_close(kernel.gptq_linear(x, *gptq_args(t, bits), None, bits, 32, 1), x @ dense(t).T)
    assert_close(kernel.gptq_linear(x, *gptq_args(t, bits, 0), None, bits, 32, 0), x @ dense(t).T)


def test_nibbles_by_hand():
    """Word 0x76543210, zero points 1 stored as 0, scale 2: weights -2, 0, 2 .. 12 along d_in, and their sum 40."""
    qweight = torch.full((1, 8), 0x76543210, dtype=torch.int32)
    args = (qweight, torch.zeros(1, 1, dtype=torch.int32), torch.full((1, 8), 2.0).half())
    assert gptq_linear(torch.ones(1, 8), *args, bits=4, group_size=8).tolist() == [[40.0] * 8]
    assert gptq_linear(torch.eye(8), *args, bits=4, group_size=-1)[:, 3].tolist() == [-2, 0, 2, 4, 6, 8, 10, 12]
    # the same word of AWQ holds outputs 0, 2, 4, 6, 1, 3, 5, 7; zero points 0
    y = awq_linear(torch.ones(1, 1), qweight[:, :1], args[1], args[2], group_size=1)
    assert y.tolist() == [[0, 8, 2, 10, 4, 12, 6, 14]]


def test_operators_are_sound():
    x, bias = torch.randn(3, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    t = plain(4, 32, 32, 32)
    torch.library.opcheck(op._gptq_linear, (x, *gptq_args(t, 4), bias, 4, 32, 1))
    torch.library.opcheck(op._gptq_linear, (x, *gptq_args(t, 4, permuted=True), None, 4, 32, 1))
    torch.library.opcheck(op._awq_linear, (x, *awq_args(t), bias, 32))
    torch.library.opcheck(op._gptq_linear_backward, (torch.randn(3, 32), *gptq_args(t, 4), 4, 32, 1))
    torch.library.opcheck(op._awq_linear_backward, (torch.randn(3, 32), *awq_args(t), 32))


@pytest.mark.parametrize("awq", [False, True])
def test_batches_strides_and_gradients(awq):
    t = plain(4, 32, 32, 32)
    bias = torch.randn(32, requires_grad=True)

    def product(x):
        if awq:
            return awq_linear(x, *awq_args(t), bias, group_size=32)
        return gptq_linear(x, *gptq_args(t, 4), bias, bits=4, group_size=32)

    x = torch.randn(2, 32, 3, requires_grad=True)
    y = product(x.transpose(1, 2))
    expected = x.transpose(1, 2) @ dense(t).T + bias
    assert_close(y.detach(), expected.detach())
    grad = torch.randn(2, 3, 32)
    wanted = torch.autograd.grad(expected, (x, bias), grad)
    for actual, right in zip(torch.autograd.grad(y, (x, bias), grad), wanted, strict=True):
        assert_close(actual, right)
    nothing = torch.zeros(0, 32, requires_grad=True)
    product(nothing).sum().backward()
    assert nothing.grad.shape == (0, 32)
    assert_close(product(torch.ones(32)).detach(), (dense(t).sum(1) + bias).detach())
    # Rows that begin where no load of 64 bits may: at an odd element of 16 bits.
    odd = torch.randn(33).bfloat16()[1:]
    assert_close(product(odd).detach(), (odd.float() @ dense(t).T + bias).bfloat16().detach())


def test_compiles_without_graph_breaks():
    t = plain(3, 32, 32, 32)
    args = gptq_args(t, 3)

    def product(x):
        return gptq_linear(x, *args, bits=3, group_size=32) * 2

    x = torch.randn(2, 32)
    assert_close(torch.compile(product, fullgraph=True, backend="aot_eager")(x), product(x))


def layer_of(layout, bits, t, d_in, d_out, group_size, bias):
    layer = AffineLinear(d_in, d_out, bits=bits, group_size=group_size, layout=layout, bias=bias)
    layer.pack(t)
    if bias:
        layer.bias.data = torch.randn(d_out)
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 32, 32, False), (96, 32, 64, False), (64, 32, 32, True)])
@pytest.mark.parametrize(
    ("layout", "bits"), [(name, bits) for name in ("gptq", "gptq_v2") for bits in BITS] + [("awq", 4)]
)
def test_storage_layer(layout, bits, shape, bias):
    d_in, d_out, group_size, permuted = shape
    if layout == "awq" and (permuted or d_in % group_size):
        pytest.skip("AWQ has no such groups")
    t = plain(bits, *shape)
    layer = layer_of(layout, bits, t, d_in, d_out, group_size, bias)
    x, grad = torch.randn(2, 3, d_in, requires_grad=True), torch.randn(2, 3, d_out)
    layer.kernel_devices = frozenset()
    expected = layer(x)
    (grad_expected,) = torch.autograd.grad(expected, x, grad)
    layer.kernel_devices = frozenset({"cpu"})
    layer.prepare()
    assert layer.kernel_forward(x.view(-1, d_in)) is not None
    y = layer(x)
    assert_close(y.detach(), expected.detach())
    assert_close(torch.autograd.grad(y, x, grad)[0], grad_expected)


def test_storage_layer_follows_what_it_holds():
    """g_idx is handed on where it must be, and the choice is made again when the tensors change."""
    ordered, permuted = plain(4, 64, 32, 32), plain(4, 64, 32, 32, permuted=True)
    layer = layer_of("gptq", 4, ordered, 64, 32, 32, bias=False)
    layer.kernel_devices = frozenset({"cpu"})
    x = torch.randn(2, 64)
    assert_close(layer(x), x @ dense(ordered).T)
    layer.pack(permuted)
    assert_close(layer(x), x @ dense(permuted).T)


def test_storage_layer_without_a_kernel():
    t = plain(4, 64, 32, 32)
    other = AffineLinear(64, 32, bits=4, group_size=32, layout=PackQuantizedLayout())
    other.pack(t)
    assert other.kernel_forward(torch.randn(2, 64)) is None
    layer = layer_of("gptq", 4, t, 64, 32, 32, bias=False)
    assert layer.kernel_forward(torch.randn(2, 64).double()) is None


BAD = [
    (r"bits=5 is not supported", {"bits": 5}),
    (r"zero_offset=2 must be 1", {"zero_offset": 2}),
    (r"group_size=0 must be -1", {"group_size": 0}),
    (r"x is torch.int64: cast it", {"x": torch.zeros(2, 64, dtype=torch.long)}),
    (r"scales is torch.float64: cast it", {"scales": torch.zeros(2, 32).double()}),
    (r"got torch.int64 of shape \(8, 32\)", {"qweight": torch.zeros(8, 32, dtype=torch.long)}),
    (r"\(8, 32\) holds 64 x 32 codes of 4 bits; x and scales say 72 x 32", {"x": torch.zeros(2, 72)}),
    (r"scales has 2 groups, d_in=64 in groups of group_size=16 makes 4", {"group_size": 16}),
    (r"qzeros is torch.int32 of shape \(2, 3\).*\(2, 4\)", {"qzeros": torch.zeros(2, 3, dtype=torch.int32)}),
    (r"g_idx is torch.int64 of shape \(64,\).*int32 of shape \(64,\)", {"g_idx": torch.zeros(64, dtype=torch.long)}),
    (r"bias is torch.float32 of shape \(31,\).*\(32,\)", {"bias": torch.zeros(31)}),
    (r"x lies on cpu and bias on meta", {"bias": torch.zeros(32, device="meta")}),
]


@pytest.mark.parametrize(("message", "wrong"), BAD)
def test_bad_input_is_named(message, wrong):
    good = dict(zip(("qweight", "qzeros", "scales"), gptq_args(plain(4, 64, 32, 32), 4), strict=False))
    with pytest.raises(ValueError, match=message):
        gptq_linear(**{"x": torch.zeros(2, 64), "bits": 4, "group_size": 32} | good | wrong)


def test_bad_input_of_awq_is_named():
    qweight, qzeros, scales = awq_args(plain(4, 64, 32, 32))
    with pytest.raises(ValueError, match=r"\(64, 4\) holds 64 x 32 codes of 4 bits; x and scales say 32 x 32"):
        awq_linear(torch.zeros(2, 32), qweight, qzeros, scales, group_size=32)
    with pytest.raises(ValueError, match="x lies on cpu and qzeros on meta"):
        awq_linear(torch.zeros(2, 64), qweight, qzeros.to("meta"), scales, group_size=32)
    with pytest.raises(ValueError, match=r"scales has 2 groups, d_in=64 in groups of group_size=16 makes 4"):
        awq_linear(torch.zeros(2, 64), qweight, qzeros, scales, group_size=16)
    with pytest.raises(ValueError, match=r"x is torch.int64: cast it"):
        awq_linear(torch.zeros(2, 64).long(), qweight, qzeros, scales, group_size=32)
