"""The lookup-table layer: decoding by hand, rows that cross blocks, forward and gradient, quant_state, casts."""

import json

import pytest
import torch

from hf_efficiency.quantization.layers.lut import LUTLinear
from hf_efficiency.quantization.nf4 import NF4


def _layer(d_in: int = 40, d_out: int = 12, bias: bool = False, **options) -> tuple[LUTLinear, torch.Tensor]:
    method = NF4(**options)
    layer = method.empty_layer("x", d_in, d_out, bias=bias)
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(d_in))
    method.quantize_weight("x", weight, layer)
    if bias:
        layer.bias.data = torch.linspace(-1, 1, d_out)
    return layer, weight


def _bytes(state: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def test_decodes_by_hand() -> None:
    """Table 0, 10, ..., 150; bytes 0x1F and 0x20; scales 2 and 3 in blocks of 32, the second one of 4 elements."""
    layer = LUTLinear(18, 2, block_size=32, double_quant=False)
    weight = torch.zeros(18, 1, dtype=torch.uint8)
    weight[0], weight[16] = 0x1F, 0x20
    layer.store({"weight": weight, "quant_map": torch.arange(16) * 10.0, "absmax": torch.tensor([2.0, 3.0])})
    expected = torch.zeros(2, 18)
    expected[0, 0], expected[0, 1], expected[1, 14] = 10 * 2, 150 * 2, 20 * 3
    assert torch.equal(layer.dequantize(), expected)


def test_decodes_double_quantized_scales_by_hand() -> None:
    """Scale of block i is table[code] * nested[i // 256] + offset: 0.5 * 4 + 10 and 0.25 * 8 + 10."""
    layer = LUTLinear(32, 257, block_size=32)
    table = torch.zeros(256)
    table[7], table[9] = 0.5, 0.25
    codes = torch.zeros(257, dtype=torch.uint8)
    codes[0], codes[256] = 7, 9
    layer.store({"absmax": codes, "nested_quant_map": table, "nested_absmax": torch.tensor([4.0, 8.0])})
    layer.store({"nested_offset": torch.tensor(10.0)})
    assert layer.scales()[[0, 1, 256]].tolist() == [12.0, 10.0, 12.0]
    assert layer.scales(255, 257).tolist() == [10.0, 12.0]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("d_in", [40, 33, 64, 7])
def test_rows_are_slices_of_the_weight(d_in: int, double_quant: bool) -> None:
    layer, _ = _layer(d_in=d_in, d_out=300, double_quant=double_quant, block_size=32)
    whole = layer.dequantize()
    for start, stop in ((0, 1), (1, 2), (3, 100), (255, 300), (299, 300), (0, 300)):
        assert torch.equal(layer.dequantize_rows(start, stop), whole[start:stop])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_and_gradient(dtype: torch.dtype) -> None:
    layer, _ = _layer(bias=True)
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    y = layer(x)
    expected = torch.nn.functional.linear(x, layer.dequantize().to(dtype), layer.bias.to(dtype))
    assert y.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.13, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(y, expected, atol=tolerance, rtol=0)
    y.float().square().sum().backward()
    grad = (2 * y.detach().float()).to(dtype) @ layer.dequantize().to(dtype)
    torch.testing.assert_close(x.grad, grad, atol=40 * tolerance, rtol=0.02)


def test_matches_the_weight_within_half_a_step() -> None:
    """The widest gap of the NF4 table is 0.304 of a block's largest weight."""
    layer, weight = _layer(d_in=64, d_out=64)
    scale = weight.abs().amax(dim=1, keepdim=True)
    assert ((layer.dequantize() - weight).abs() <= (0.152 + 0.01) * scale).all()


def test_casting_a_model_leaves_tables_scales_and_codes() -> None:
    layer, _ = _layer(bias=True)
    before = {name: value.clone() for name, value in layer.named_buffers()}
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == layer.compute_dtype == torch.bfloat16
    for name, value in layer.named_buffers():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_quant_state_is_what_bitsandbytes_writes() -> None:
    layer, _ = _layer()
    layer.nested_offset.fill_(0.5)
    text = bytes(layer.quant_state().tolist()).decode()
    assert text == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [12, 40], '
        '"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}'
    )
    single, _ = _layer(double_quant=False)
    assert "nested" not in bytes(single.quant_state().tolist()).decode()
    assert layer.read_quant_state(layer.quant_state()) == 0.5
    assert single.read_quant_state(single.quant_state()) == 0


def test_reading_takes_block_size_and_table_from_the_file() -> None:
    layer, _ = _layer(double_quant=False)
    layer.read_quant_state(_bytes({"quant_type": "fp4", "blocksize": 128, "dtype": "float16", "shape": [12, 40]}))
    assert (layer.block_size, layer.quant_type) == (128, "fp4")
    assert layer.declare()["absmax"] == ((4,), torch.float32)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"quant_type": "nf4", "blocksize": 64, "shape": [40, 12]}, r"shape \(40, 12\), the layer is \(12, 40\)"),
        ({"quant_type": "nf4", "blocksize": 64}, "not the JSON of bitsandbytes.*damaged"),
        ({"quant_type": "nf4", "blocksize": 63, "shape": [12, 40]}, "block_size=63 must be one of"),
        ({"quant_type": "af4", "blocksize": 64, "shape": [12, 40]}, "quant_type='af4' must be one of"),
        (
            {"quant_type": "nf4", "blocksize": 64, "shape": [12, 40], "nested_offset": 0.1},
            "contradicts bnb_4bit_use_double_quant=False",
        ),
    ],
)
def test_bad_quant_state(state: dict, message: str) -> None:
    layer, _ = _layer(double_quant=False)
    with pytest.raises(ValueError, match=message):
        layer.read_quant_state(_bytes(state))
    with pytest.raises(ValueError, match="not the JSON of bitsandbytes"):
        layer.read_quant_state(torch.tensor([123, 34, 255], dtype=torch.uint8))


def test_fp4_of_bitsandbytes_decodes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(1))
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="fp4")
    layer = NF4(quant_type="fp4").empty_layer("x", 40, 12)
    stored = state.as_dict(packed=True)
    offset = layer.read_quant_state(stored.pop("quant_state.bitsandbytes__fp4"))
    layer.store({"weight": packed, **stored, "nested_offset": offset})
    assert torch.equal(layer.dequantize(), functional.dequantize_4bit(packed, state))


def test_compiles_without_graph_break() -> None:
    layer, _ = _layer(bias=True)
    x = torch.randn(3, 40)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("block_size", "quant_type"), [(32, "nf4"), (64, "fp4"), (4096, "nf4")])
def test_kernel_agrees(block_size: int, quant_type: str, double_quant: bool, bias: bool) -> None:
    """The Triton kernel, interpreted, against the layer's own product and gradient."""
    layer, _ = _layer(block_size=block_size, double_quant=double_quant, bias=bias)
    layer.quant_type = quant_type
    if quant_type == "fp4":
        layer.quant_map.copy_(torch.randn(16))
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.randn(2, 3, layer.out_features)
    expected = layer(x)
    layer.kernel_devices = frozenset({"cpu"})
    actual = layer(x)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(actual, x, grad)[0], torch.autograd.grad(expected, x, grad)[0], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("d_in", [33, 64])
def test_kernel_reads_any_storage(d_in: int) -> None:
    """The codes of 33 x 5 weights are 83 bytes, stored in 42 words of 2."""
    layer, weight = _layer(d_in=d_in, d_out=5)
    method = NF4(quant_storage="bfloat16")
    other = method.empty_layer("x", d_in, 5)
    method.quantize_weight("x", weight, other)
    other.kernel_devices = frozenset({"cpu"})
    x = torch.randn(2, d_in)
    torch.testing.assert_close(other(x), layer(x), atol=1e-5, rtol=1e-5)
    assert other.kernel_forward(x.double()) is None
