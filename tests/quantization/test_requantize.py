"""Weights stored again in the format of a layer."""

import pytest
import torch
from torch import nn

from hf_efficiency.quantization.affine import AffineGrid
from hf_efficiency.quantization.formats import AffineTensors
from hf_efficiency.quantization.layers.affine import AffineLinear
from hf_efficiency.quantization.layers.base import QuantizedLinear
from hf_efficiency.quantization.layers.lattice import LatticeLinear
from hf_efficiency.quantization.layers.lut import LUTLinear
from hf_efficiency.quantization.nf4 import NF4
from hf_efficiency.quantization.requantize import exact_weight, requantize


def affine_layer(weight, *, bits=4, group_size=16, layout="gptq", g_idx=None, compute_dtype=torch.float32):
    d_out, d_in = weight.shape
    layer = AffineLinear(
        d_in, d_out, bits=bits, group_size=group_size, layout=layout, bias=False, compute_dtype=compute_dtype
    )
    grid = AffineGrid(bits, group_size)
    order = torch.arange(d_in) if g_idx is None else g_idx.long().argsort(stable=True)
    scales, zeros = grid.fit(weight[:, order])
    layer.pack(grid.quantize(weight, scales, zeros, g_idx))
    return layer


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    """Scale 1 and zero point 8: 2.3 goes to 2, -1.6 to -2; what lies on the grid stays."""
    layer = AffineLinear(16, 8, bits=4, group_size=16)
    codes = torch.arange(16, dtype=torch.uint8).repeat(8, 1)  # -8 ... 7
    layer.pack(AffineTensors(codes, torch.ones(8, 1), torch.full((8, 1), 8), torch.zeros(16, dtype=torch.int32)))
    weight = layer.dequantize()
    assert weight[0].tolist() == list(range(-8, 8))
    weight[0, 10], weight[0, 6] = 2.3, -1.6
    new = requantize(layer, weight).dequantize()
    assert torch.equal(new[1:], weight[1:])
    assert new[0].tolist() == list(range(-8, 8))


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "awq"])
def test_fresh_grid_where_the_old_one_is_too_small(layout):
    layer = affine_layer(random(32, 32), layout=layout)
    weight = 10 * random(32, 32, seed=1)
    error = (requantize(layer, weight).dequantize() - weight).norm() / weight.norm()
    plain = (affine_layer(weight, layout=layout).dequantize() - weight).norm() / weight.norm()
    assert error < 1.01 * plain


def test_permuted_groups_keep_their_columns():
    g_idx = torch.arange(32, dtype=torch.int32).flip(0) // 16
    layer = affine_layer(random(32, 32), g_idx=g_idx)
    assert layer.permuted()
    weight = random(32, 32, seed=1) * torch.where(g_idx == 1, 10.0, 0.1)
    new = requantize(layer, weight)
    assert torch.equal(new.unpack().g_idx, g_idx)
    for group in (0, 1):  # a scale of its own for each
        columns = g_idx == group
        assert (new.dequantize() - weight)[:, columns].norm() < 0.12 * weight[:, columns].norm()


def test_ragged_last_group():
    weight = random(32, 40)
    layer = affine_layer(weight, group_size=16)
    assert torch.equal(requantize(layer, layer.dequantize()).dequantize(), layer.dequantize())


def test_nf4_is_what_quantizing_gives():
    method = NF4(block_size=32, double_quant=True)
    layer, expected = (LUTLinear(32, 16, block_size=32) for _ in range(2))
    weight = random(16, 32, seed=1)
    method.quantize_weight("a", random(16, 32), layer)
    method.quantize_weight("b", weight, expected)
    assert torch.equal(requantize(layer, weight).dequantize(), expected.dequantize())
    layer.quant_type = "fp4"
    with pytest.raises(ValueError, match="'fp4' is only read from checkpoints"):
        requantize(layer, weight)


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize(("bits", "bound"), [(2, 0.35), (3, 0.2), (4, 0.1)])
def test_lattice(bits, bound, tuned):
    """A Gaussian weight: E8P at 2 bits leaves about 30 % of the norm without error feedback."""
    layer = LatticeLinear(64, 32, bits=bits, tuned=tuned)
    for name, buffer in layer.named_buffers():
        buffer.zero_() if name != "scale" else buffer.fill_(1)
    if tuned:
        layer.su.copy_(1 + 0.1 * random(32))
        layer.sv.copy_(-1 + 0.1 * random(64))
    weight = random(32, 64, seed=1)
    new = requantize(layer, weight)
    assert (new.dequantize() - weight).norm() / weight.norm() < bound
    again = requantize(new, new.dequantize())
    assert (again.dequantize() - new.dequantize()).norm() < 0.02 * weight.norm()


def test_bias_and_dtype():
    layer = affine_layer(random(32, 32), compute_dtype=torch.bfloat16)
    new = requantize(layer, random(32, 32), bias=torch.arange(32.0))
    assert isinstance(new.bias, nn.Parameter)
    assert new.bias.dtype == new.dequantize().dtype == torch.bfloat16
    assert exact_weight(new).dtype == torch.float32
    assert new.compute_dtype == torch.bfloat16
    x = random(2, 32).bfloat16()
    torch.testing.assert_close(new(x), x @ new.dequantize().T + new.bias, atol=0.1, rtol=0.02)


def test_bad_input():
    layer = affine_layer(random(32, 32))
    with pytest.raises(ValueError, match=r"shape \(32, 16\), the layer holds \(32, 32\)"):
        requantize(layer, random(32, 16))
    with pytest.raises(ValueError, match="NaN or infinity"):
        requantize(layer, torch.full((32, 32), float("inf")))

    class Other(QuantizedLinear):
        def declare(self):
            return {"codes": ((2,), torch.int8)}

    with pytest.raises(TypeError, match="Other is no storage layer"):
        requantize(Other(2, 2), torch.ones(2, 2))
