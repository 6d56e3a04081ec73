"""Trained numbers of every LoRA-like type, and of PEFT's own beside them, by the papers' formulas."""

import pytest
from peft import IA3Config, LoraConfig, PrefixTuningConfig, VeraConfig, get_peft_model

from hf_efficiency import AdaDoRAConfig, DVoRAConfig, DyLoRAConfig, SoRAConfig
from tests import tiny

# d_in, d_out of the tiny Llama's linear layers.
SHAPES = {
    "q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "o_proj": (64, 64),
    "gate_proj": (64, 160), "up_proj": (64, 160), "down_proj": (160, 64),
}  # fmt: skip
LAYERS, R = 2, 5

FORMULAS = {
    "lora": (LoraConfig, {"r": R}, lambda d_in, d_out: R * (d_in + d_out)),
    "dora": (LoraConfig, {"r": R, "use_dora": True}, lambda d_in, d_out: R * (d_in + d_out) + d_out),
    "dylora": (DyLoRAConfig, {"r": R}, lambda d_in, d_out: R * (d_in + d_out)),
    "sora": (SoRAConfig, {"r": R}, lambda d_in, d_out: R * (d_in + d_out) + R),
    "adadora": (AdaDoRAConfig, {"init_r": R, "target_r": 2}, lambda d_in, d_out: R * (d_in + d_out) + R + d_out),
    "vera": (VeraConfig, {"r": 96}, lambda d_in, d_out: 96 + d_out),
    "dvora": (DVoRAConfig, {"r": 96}, lambda d_in, d_out: 96 + 2 * d_out),
}


def trained(config):
    return sum(p.numel() for p in get_peft_model(tiny.build_llama(), config).parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", FORMULAS)
def test_of_one_and_of_all_layers(kind):
    build, arguments, formula = FORMULAS[kind]
    for name, shape in SHAPES.items():
        assert trained(build(target_modules=[name], **arguments)) == LAYERS * formula(*shape)
    if kind != "vera":  # which shares matrices of one shape
        total = LAYERS * sum(formula(*shape) for shape in SHAPES.values())
        assert trained(build(target_modules="all-linear", **arguments)) == total


def test_of_ia3():
    """A vector at the outputs of keys and values, and one at the input of the feed-forward's last layer."""
    config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    assert trained(config) == LAYERS * (32 + 32 + 160)


def test_of_prefixes():
    """Keys and values of each layer for each virtual token; two heads of 16."""
    assert trained(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)) == 7 * LAYERS * 2 * (2 * 16)
