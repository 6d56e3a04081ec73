"""The pack-quantized layout: hand-packed words, round trips, the config parser, and the compressed-tensors package."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_efficiency.quantization.compressed_tensors import PackQuantizedConfig, PackQuantizedLayout, WeightScheme
from hf_efficiency.quantization.formats import AffineTensors, default_g_idx, group_count


def _random(out: int, d_in: int, bits: int, group: int, symmetric: bool, seed: int = 0) -> AffineTensors:
    rng = torch.Generator().manual_seed(seed)
    groups = group_count(d_in, group)
    codes = torch.randint(0, 1 << bits, (out, d_in), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (out, groups), generator=rng, dtype=torch.uint8)
    if symmetric:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    scales = torch.rand(out, groups, generator=rng).to(torch.bfloat16).float()
    return AffineTensors(codes, scales, zeros, default_g_idx(d_in, group))


def test_hand_packed_words() -> None:
    """3-bit codes 1, 2, ..., 7, 0, 1, 2, 3: code 10 has its low 2 bits in word 0 and its high bit in word 1."""
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 7]], dtype=torch.uint8)
    tensors = AffineTensors(codes, torch.ones(1, 1), torch.tensor([[5]], dtype=torch.uint8), default_g_idx(11, -1))
    stored = PackQuantizedLayout().pack(tensors, 3)
    string = sum(int(c) << (3 * i) for i, c in enumerate(codes[0].tolist()))
    words = [int(w) & 0xFFFFFFFF for w in stored["weight_packed"][0].tolist()]
    assert words == [string & 0xFFFFFFFF, string >> 32]
    assert words[1] == 1
    assert stored["weight_zero_point"].tolist() == [[5]]
    assert stored["weight_shape"].tolist() == [1, 11]


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 20),
    d_in=st.integers(1, 70),
    bits=st.integers(1, 8),
    group=st.sampled_from([-1, 1, 7, 16, 32]),
    symmetric=st.booleans(),
    permuted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_round_trip(out: int, d_in: int, bits: int, group: int, symmetric: bool, permuted: bool, seed: int) -> None:
    tensors = _random(out, d_in, bits, group, symmetric, seed)
    if permuted:
        tensors.g_idx = tensors.g_idx[torch.randperm(d_in, generator=torch.Generator().manual_seed(seed))]
    layout = PackQuantizedLayout(symmetric, act_order=permuted, group_size=group)
    layout.check(d_in, out, bits, group)
    stored = layout.pack(tensors, bits)
    assert {k: (tuple(v.shape), v.dtype) for k, v in stored.items()} == layout.declare(d_in, out, bits, group)
    back = layout.unpack(stored, bits, d_in, out)
    for name in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(back, name), getattr(tensors, name)), name


def test_uninitialized_g_idx_means_no_order() -> None:
    tensors = _random(4, 32, 4, 16, False)
    stored = PackQuantizedLayout(act_order=True).pack(tensors, 4)
    stored["weight_g_idx"] = torch.full((32,), -1, dtype=torch.int32)
    back = PackQuantizedLayout(act_order=True).unpack(stored, 4, 32, 4)
    assert torch.equal(back.g_idx, tensors.g_idx)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, -1])
def test_agrees_with_the_package(bits: int, symmetric: bool, group: int) -> None:
    """What compressed-tensors writes decodes to the weight that it decodes to, and packing gives its words back."""
    package = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    out, d_in = 19, 48
    plain = _random(out, d_in, bits, group, symmetric)
    args = package.quantization.QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="channel" if group == -1 else "group", group_size=group
    )
    scheme = package.quantization.QuantizationScheme(targets=["Linear"], weights=args)
    middle = 1 << (bits - 1)
    size = d_in if group == -1 else group
    weight = (plain.codes.float() - plain.zeros.float().repeat_interleave(size, 1)) * plain.scales.repeat_interleave(
        size, 1
    )
    dense = {
        "weight": weight,
        "weight_scale": plain.scales,
        "weight_zero_point": (plain.zeros.int() - middle).to(torch.int8),
    }
    theirs = PackedQuantizationCompressor.compress(dense, scheme)
    layout = WeightScheme(bits, group, symmetric).layout()
    ours = layout.pack(plain, bits)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    back = layout.unpack(theirs, bits, d_in, out)
    decoded = (back.codes.float() - back.zeros.float()[:, back.g_idx.long()]) * back.scales[:, back.g_idx.long()]
    assert torch.equal(decoded, PackedQuantizationCompressor.decompress(theirs, scheme)["weight"])


# What llm-compressor 0.19 writes, shortened to the keys that say something about weights.
_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*mlp\\.gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "weights": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64,
                        "actorder": "static"},
        },
        "group_1": {
            "targets": ["re:.*down_proj$"],
            "format": "pack-quantized",
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None,
                        "actorder": "group"},
        },
    },
}  # fmt: skip


def test_config_targets_and_ignore() -> None:
    config = PackQuantizedConfig.from_dict(_CONFIG)
    assert config.scheme_for("model.layers.0.self_attn.q_proj") == WeightScheme(4, 64, False)
    assert config.scheme_for("model.layers.0.mlp.down_proj") == WeightScheme(8, -1, True, act_order=True)
    assert config.scheme_for("lm_head") is None
    assert config.scheme_for("model.layers.0.mlp.gate") is None
    assert config.scheme_for("model.layers.0.mlp.gate_proj") is not None
    assert config.scheme_for("model.embed_tokens", classes=("Embedding",)) is None


def _with(**weights: object) -> dict:
    group = {**_CONFIG["config_groups"]["group_0"]}
    group["weights"] = {**group["weights"], **weights}
    return {"format": "pack-quantized", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "needs config_groups"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "presets by name are not read"),
        ({**_with(), "format": "int-quantized"}, "stored as 'int-quantized'.*only 'pack-quantized'"),
        (_with(type="float"), "'float' weights of 4 bits"),
        (_with(num_bits=16), "of 16 bits"),
        (_with(strategy="tensor"), "strategy 'tensor'"),
        (_with(group_size=None), "group_size None"),
    ],
)
def test_configs_that_are_not_read(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackQuantizedConfig.from_dict(config)


def test_activation_quantization_is_refused() -> None:
    config = _with()
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(ValueError, match="quantizes activations too"):
        PackQuantizedConfig.from_dict(config)


def test_bad_layers() -> None:
    layout = PackQuantizedLayout()
    with pytest.raises(ValueError, match="1- to 8-bit codes, got bits=9"):
        layout.check(64, 64, 9, 32)
    with pytest.raises(ValueError, match="group_size must be -1"):
        layout.check(64, 64, 4, 0)
    with pytest.raises(ValueError, match=r"in_features=576 is no multiple of group_size=128.*group_size=128\)"):
        layout.check(576, 64, 4, 128)
    tensors = _random(4, 32, 4, 16, False)
    with pytest.raises(ValueError, match="zero point 8 everywhere"):
        PackQuantizedLayout(symmetric=True).pack(tensors, 4)
    with pytest.raises(ValueError, match=r"weight_shape says \(4, 32\), the layer is \(4, 48\)"):
        layout.unpack(layout.pack(tensors, 4), 4, 48, 4)
    tensors.g_idx = tensors.g_idx.flip(0)
    with pytest.raises(ValueError, match="groups are permuted"):
        layout.pack(tensors, 4)
