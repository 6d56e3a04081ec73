"""Attention and feed-forward, found in every family by structure."""

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_efficiency.adapters.sublayers import block_names, find_attention, find_feedforward
from tests.families import FAMILIES, build_family

# Family: the output projections of a block, and the layer that reads the feed-forward's input.
EXPECTED = {
    "llama": ("self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj", "mlp.c_fc"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h"),
    "opt": ("self_attn.out_proj", "fc2", "fc1"),
    "qwen2": ("self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj"),
    "qwen3": ("self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj"),
    "gemma2": ("self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj"),
    "gemma3": ("self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj"),
    "phi": ("self_attn.dense", "mlp.fc2", "mlp.fc1"),
    "phi3": ("self_attn.o_proj", "mlp.down_proj", "mlp.gate_up_proj"),
    "mixtral": ("self_attn.o_proj", None, None),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    attention, feedforward, reader = EXPECTED[family]
    model = build_family(family)
    blocks = block_names(model)
    assert len(blocks) == 2
    assert [found.output for found in find_attention(model)] == [f"{block}.{attention}" for block in blocks]
    if feedforward is None:
        with pytest.raises(ValueError, match=r"feed-forward of model.layers.0 is a mixture of experts.*target_modules"):
            find_feedforward(model)
        return
    found = find_feedforward(model)
    assert [part.output for part in found] == [f"{block}.{feedforward}" for block in blocks]
    assert [part.inputs[0] for part in found] == [f"{block}.{reader}" for block in blocks]


def test_adapted_model_has_the_same_sublayers():
    model = build_family("llama")
    before = find_attention(model), find_feedforward(model)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear")).base_model.model
    assert (find_attention(model), find_feedforward(model)) == before


def test_models_without_blocks_or_attention():
    with pytest.raises(ValueError, match="Linear has no list of blocks with linear layers"):
        find_attention(nn.Linear(2, 2))
    stack = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2))
    with pytest.raises(ValueError, match=r"0 has no attention to adapt: name linear layers in target_modules"):
        find_attention(nn.ModuleDict({"blocks": stack}))
    assert [part.output for part in find_feedforward(nn.ModuleDict({"blocks": stack}))] == ["blocks.0.1", "blocks.1.1"]
