"""NF4 codes and constants: worked by hand, from the definition, and to the bit against bitsandbytes."""

import pytest
import torch

from hf_efficiency.quantization.layers.lut import BLOCK_SIZES, LUTLinear
from hf_efficiency.quantization.nf4 import NF4, double_quantize, dynamic_map, nf4_table, quantize_nf4


def _unpack(packed: torch.Tensor) -> list[int]:
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], dim=-1).flatten().tolist()


def test_table_is_normal_quantiles() -> None:
    """8 positive and 7 negative quantiles between 1/2 and 0.9677083, and zero, divided by the largest."""
    probability = 0.9677083
    positive = torch.special.ndtri(torch.linspace(probability, 0.5, 9)[:-1].double()).float()
    negative = -torch.special.ndtri(torch.linspace(probability, 0.5, 8)[:-1].double()).float()
    values = torch.cat([negative, torch.zeros(1), positive]).sort().values
    torch.testing.assert_close(nf4_table(), values / values.max(), atol=1.2e-7, rtol=0)


def test_dynamic_map_by_hand() -> None:
    """Decade 10^-6 holds 0.55 alone; decade 10^-5 the middles 0.325 and 0.775; the largest are 1 - 0.9/128 and 1."""
    table = dynamic_map()
    assert table.shape == (256,)
    assert torch.equal(table, table.sort().values)
    assert table[127] == 0
    torch.testing.assert_close(table[128:131], torch.tensor([0.55e-6, 3.25e-6, 7.75e-6]))
    torch.testing.assert_close(table[-2:], torch.tensor([1 - 0.9 / 128, 1.0]))
    assert torch.equal(table[:127], -table[128:255].flip(0))


def test_codes_by_hand() -> None:
    """absmax 2: -2 is code 0, 2 is code 15, 0 is 7; 0.9 / 2 = 0.45 is nearest 0.4407 (12); -1.2 / 2 lies below the
    middle -0.6106 of -0.6962 and -0.5251, so it is code 2."""
    weight = torch.zeros(1, 32)
    weight[0, :5] = torch.tensor([-2.0, 2.0, 0.0, 0.9, -1.2])
    packed, absmax = quantize_nf4(weight, 32)
    assert absmax.tolist() == [2.0]
    assert packed.shape == (16, 1)
    assert packed[:3, 0].tolist() == [0x0F, 0x7C, 0x27]
    assert _unpack(packed)[5:] == [7] * 27


def test_double_quantization_by_hand() -> None:
    """Scales 1, 2, 6: mean 3, centred -2, -1, 3, scale 3: -2/3, -1/3 and 1 in the dynamic map."""
    codes, nested, offset = double_quantize(torch.tensor([1.0, 2.0, 6.0]))
    assert offset == 3
    assert nested.tolist() == [3.0]
    torch.testing.assert_close(dynamic_map()[codes.int()], torch.tensor([-2 / 3, -1 / 3, 1.0]), atol=0.0036, rtol=0)
    equal, nested, offset = double_quantize(torch.full((5,), 0.25))
    assert (nested.item(), offset.item()) == (0.0, 0.25)
    assert equal.tolist() == [0] * 5


_SHAPES = [(192, 576), (3, 7), (5, 64), (33, 65), (1, 1), (4, 4096), (7, 5001)]


def _weights(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> torch.Tensor:
    rng = torch.Generator().manual_seed(shape[0] * 31 + shape[1])
    weight = torch.randn(shape, generator=rng) * 0.02
    if kind == "outliers":  # rows and columns of very different scale, a few large weights: what real layers look like
        weight *= torch.randn(shape[0], 1, generator=rng).exp() * torch.randn(shape[1], generator=rng).exp()
        weight.view(-1)[:: max(1, weight.numel() // 7)] = 3.0
    elif kind == "zero blocks":
        weight.view(-1)[weight.numel() // 3 :] = 0
    elif kind == "zeros":
        weight.zero_()
    elif kind == "constant":
        weight.fill_(-0.75)
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "outliers", "zero blocks", "zeros", "constant"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_bit_identical_to_bitsandbytes(kind: str, double_quant: bool, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for shape in _SHAPES:
        for block_size in BLOCK_SIZES if shape == (33, 65) else (64, 256):
            weight = _weights(shape, kind, dtype)
            packed, state = functional.quantize_4bit(
                weight, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
            )
            method = NF4(block_size=block_size, double_quant=double_quant)
            layer = method.empty_layer("x", shape[1], shape[0], compute_dtype=dtype)
            method.quantize_weight("x", weight, layer)
            theirs = state.as_dict(packed=True)
            where = f"{shape} {block_size}"
            assert torch.equal(layer.weight, packed), where
            for name in theirs.keys() - {"quant_state.bitsandbytes__nf4"}:
                assert torch.equal(getattr(layer, name), theirs[name]), f"{where} {name}"
            assert torch.equal(layer.quant_state(), theirs["quant_state.bitsandbytes__nf4"]), where
            assert torch.equal(layer.dequantize(), _reference_decode(functional, packed, state)), where


def _reference_decode(functional, packed: torch.Tensor, state) -> torch.Tensor:
    """bitsandbytes' portable decode; its AVX-512 kernel has accuracy issues of its own at large blocks."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return _dequantize_4bit_compute.__wrapped__(
        packed.reshape(-1), absmax, state.code, state.blocksize, state.shape, state.dtype
    )


def test_bit_identical_beyond_one_chunk() -> None:
    """4.4 million elements: more than are quantized at a time, and 68,907 scales for one mean."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = _weights((2100, 2100), "outliers", torch.bfloat16)
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    ours, absmax = quantize_nf4(weight, 64)
    assert torch.equal(ours, packed)
    for mine, theirs in zip(double_quantize(absmax), (state.absmax, state.state2.absmax, state.offset), strict=True):
        assert torch.equal(mine, theirs)


def test_tables_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(nf4_table(), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())


def test_bytes_can_be_stored_as_another_dtype() -> None:
    """quant_storage is a view of the same bytes, and a cast of the model does not touch them."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = _weights((6, 40), "gaussian", torch.float32)
    packed, _ = functional.quantize_4bit(weight, quant_type="nf4", quant_storage=torch.bfloat16)
    method = NF4(quant_storage="bfloat16", double_quant=False)
    layer = method.empty_layer("x", 40, 6)
    method.quantize_weight("x", weight, layer)
    assert torch.equal(layer.weight.view(torch.int16), packed.view(torch.int16))
    plain = NF4(double_quant=False).empty_layer("x", 40, 6)
    NF4(double_quant=False).quantize_weight("x", weight, plain)
    assert torch.equal(layer.to(torch.float16).dequantize().float(), plain.to(torch.float16).dequantize().float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 48}, "block_size=48 must be one of 32, 64, .*4096"),
        ({"block_size": 8192}, "block_size=8192 must be one of"),
        ({"quant_type": "int4"}, "quant_type='int4' must be one of nf4, fp4"),
        ({"quant_storage": "word"}, "quant_storage='word' is no torch dtype; use 'uint8'"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NF4(**arguments)


def test_bad_weights() -> None:
    layer = NF4().empty_layer("x", 64, 2)
    for bad in (float("nan"), float("inf")):
        weight = torch.randn(2, 64)
        weight[1, 3] = bad
        with pytest.raises(ValueError, match=r"model\.q_proj: the weight holds NaN or infinity"):
            NF4().quantize_weight("model.q_proj", weight, layer)
    with pytest.raises(ValueError, match="'fp4' is only read from checkpoints"):
        NF4(quant_type="fp4").quantize_weight("x", torch.randn(2, 64), layer)
    with pytest.raises(TypeError, match="stores into LUTLinear, got Linear"):
        NF4().quantize_weight("x", torch.randn(2, 64), torch.nn.Linear(64, 2))  # type: ignore[arg-type]


def test_bits_per_weight() -> None:
    """4 + 8/64 + 32/(64*256) bits at block size 64 with double quantization, beside the constant tables."""
    layer = LUTLinear(2048, 1024)
    stored = {name: shape for name, (shape, _) in layer.declare().items()}
    bits = 8 * stored["weight"][0] + 8 * stored["absmax"][0] + 32 * stored["nested_absmax"][0]
    assert bits / (2048 * 1024) == 4 + 8 / 64 + 32 / (64 * 256)
