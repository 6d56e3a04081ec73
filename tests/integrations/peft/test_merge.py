"""`merge_adapters`: every PEFT type that merges, on every quantized base, beside PEFT's merge on the dense model."""

import copy
import logging
import re

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_efficiency import RTNConfig, merge_adapters
from tests import families
from tests.adapters import ADAPTERS
from tests.integrations.peft.conftest import logits, packed_layers, relative
from tests.methods import STORAGES

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
# Types of PEFT beyond those of the composition test, among them all that it merges silently wrong on packed weights.
MORE = {
    "oft": peft.OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS),
    "boft": peft.BOFTConfig(boft_block_size=8, target_modules=TARGETS),
    "miss": peft.MissConfig(r=8, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=4, target_modules=TARGETS),
    "hra": peft.HRAConfig(r=4, target_modules=TARGETS),
}
MERGING = {**{name: row.build() for name, row in ADAPTERS.items() if row.merges}, **MORE}


def perturb(model, scale=0.05):
    """Moves every adapter off its start, where many change nothing."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory, load_base):
    """Folder of a perturbed adapter; all bases have one architecture, so it fits each."""
    made = {}

    def build(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            model = get_peft_model(load_base("dense"), copy.deepcopy(MERGING[kind]))
            perturb(model)
            model.save_pretrained(made[kind])
        return made[kind]

    return build


@torch.no_grad()
def layer_errors(adapted, merged):
    """Relative error of each adapted layer's outputs."""
    generator = torch.Generator().manual_seed(4)
    for name, layer in adapted.named_modules():
        if isinstance(layer, BaseTunerLayer):
            x = torch.randn(32, layer.get_base_layer().in_features, generator=generator)
            yield relative(merged.get_submodule(name)(x), layer(x))


# Every type with two bases, every base with four types or more; the composition test crosses them all.
PAIRS = [(kind, STORAGES[(i + step) % len(STORAGES)]) for i, kind in enumerate(MERGING) for step in (0, 3)]


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_merged_model_is_the_adapter_on_the_dequantized_base(
    kind, method, load_base, adapter_dir, base_tokens, tmp_path
):
    dense = load_base(method).dequantize()
    original = logits(dense, base_tokens)
    adapted = PeftModel.from_pretrained(dense, adapter_dir(kind))
    expected = logits(adapted, base_tokens)
    merged = merge_adapters(PeftModel.from_pretrained(load_base(method), adapter_dir(kind)))
    assert not packed_layers(merged)
    assert relative(expected, original) > 1e-3
    assert max(layer_errors(adapted.get_base_model(), merged)) < 4e-7
    assert relative(logits(merged, base_tokens), expected) < 3e-6  # through all layers
    if kind == "dora":  # an ordinary checkpoint
        merged.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert getattr(again.config, "quantization_config", None) is None
        assert torch.equal(logits(again, base_tokens), logits(merged, base_tokens))


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_dense_base(kind, load_base, adapter_dir, base_tokens):
    adapted = PeftModel.from_pretrained(load_base("dense"), adapter_dir(kind))
    expected = logits(adapted, base_tokens)
    assert relative(logits(merge_adapters(adapted), base_tokens), expected) < 3e-6
    with pytest.raises(ValueError, match="no adapted layer is quantized: merge without it"):
        merge_adapters(PeftModel.from_pretrained(load_base("dense"), adapter_dir(kind)), requantize=True)


def test_merged_weights_are_rounded_once(load_base, adapter_dir, base_tokens):
    """In bfloat16 they are those of the float32 merge, rounded."""
    exact = merge_adapters(PeftModel.from_pretrained(load_base("nf4-double"), adapter_dir("lora")))
    merged = merge_adapters(PeftModel.from_pretrained(load_base("nf4-double").to(torch.bfloat16), adapter_dir("lora")))
    name = "model.layers.1.mlp.down_proj"
    assert merged.get_submodule(name).weight.dtype == torch.bfloat16
    assert torch.equal(merged.get_submodule(name).weight, exact.get_submodule(name).weight.bfloat16())


@pytest.mark.parametrize("method", STORAGES)
def test_requantized_merge_stays_packed_and_says_what_it_lost(
    method, load_base, adapter_dir, base_tokens, tmp_path, caplog
):
    base = load_base(method)
    formats = {name: (type(layer), layer.declare()) for name, layer in packed_layers(base).items()}
    dense = merge_adapters(PeftModel.from_pretrained(load_base(method), adapter_dir("dora")))
    with caplog.at_level(logging.WARNING):
        merged = merge_adapters(PeftModel.from_pretrained(base, adapter_dir("dora")), requantize=True)
    assert {name: (type(layer), layer.declare()) for name, layer in packed_layers(merged).items()} == formats
    stated = [float(n) for n in re.findall(r"(?:error |\(|by )([0-9.e-]*[0-9])", caplog.messages[-1])]
    rounding, weight = 0.0, 0.0
    for name, layer in packed_layers(merged).items():
        wanted = dense.get_submodule(name).weight
        rounding += (layer.dequantize() - wanted).square().sum().item()
        weight += wanted.square().sum().item()
    error = (rounding / weight) ** 0.5
    assert stated[0] == pytest.approx(error, rel=1e-2)
    assert 0 < error < {"quip-2": 0.35, "quip-tuned": 0.35}.get(method, 0.15)
    update = sum(
        (layer.dequantize() - dense.get_submodule(name).weight).square().sum().item()
        for name, layer in packed_layers(load_base(method)).items()
    )
    assert stated[0] <= stated[1]
    assert stated[2] == pytest.approx((update / weight) ** 0.5, rel=1e-2)
    merged.save_pretrained(tmp_path)  # the same format on disk
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), base_tokens), logits(merged, base_tokens))


def test_unchanged_layers_keep_their_codes(load_base, base_tokens):
    """An adapter that changes nothing costs nothing, although the codes came from GPTQ and not from rounding."""
    base = load_base("gptq-mixed")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = merge_adapters(get_peft_model(base, ADAPTERS["lora"].build()), requantize=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in merged.state_dict().items())


@pytest.mark.parametrize("requantize", [False, True])
def test_conv1d(requantize, tmp_path):
    """PEFT sees an `nn.Linear`; the dense model has a `Conv1D` there, stored the other way round."""
    families.build_family("gpt2").save_pretrained(tmp_path / "dense")
    config = RTNConfig(bits=8, group_size=16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    adapted = get_peft_model(model, peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], init_lora_weights=False))
    tokens = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = logits(adapted, tokens)
    merged = merge_adapters(adapted, requantize=requantize)
    assert relative(logits(merged, tokens), expected) < (0.1 if requantize else 3e-6)
    assert requantize == bool(packed_layers(merged))
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert requantize or type(again.transformer.h[0].attn.c_attn) is Conv1D
    assert torch.equal(logits(again, tokens), logits(merged, tokens))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:peft")
@pytest.mark.parametrize("family", ["gpt_neox", "opt", "gemma3", "phi3", "mixtral", "bloom"])
def test_families(family, tmp_path):
    """Biases, tied heads, fused projections; Mixtral's experts have adapters on 3-D weights that stay dense."""
    families.build_family(family).save_pretrained(tmp_path / "dense")
    config = RTNConfig(bits=8, group_size=16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    lora = peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, use_dora=family != "mixtral", lora_alpha=2
    )
    adapted = get_peft_model(model, lora)
    tokens = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = logits(adapted, tokens)
    merged = merge_adapters(adapted)
    assert relative(logits(merged, tokens), expected) < 3e-6
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tokens), logits(merged, tokens)
    )


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"]])
def test_tied_heads_are_parted(targets, load_base, base_tokens, tmp_path):
    """Merging into the head in place would change the embeddings too."""
    model = load_base("rtn-group", tied=True)
    adapted = get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    expected = logits(adapted, base_tokens)
    merged = merge_adapters(adapted)
    assert relative(logits(merged, base_tokens), expected) < 3e-6
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, base_tokens), logits(merged, base_tokens))


def test_tied_heads_stay_tied_where_nothing_touched_them(load_base, base_tokens):
    merged = merge_adapters(get_peft_model(load_base("rtn-group", tied=True), ADAPTERS["lora"].build()))
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_modules_to_save(load_base, base_tokens):
    adapted = get_peft_model(load_base("nf4-double"), ADAPTERS["lora"].build(modules_to_save=["lm_head"]))
    perturb(adapted)
    expected = logits(adapted, base_tokens)
    merged = merge_adapters(adapted)
    assert type(merged.lm_head) is nn.Linear
    assert relative(logits(merged, base_tokens), expected) < 3e-6


def test_several_adapters(load_base, base_tokens):
    def build():
        torch.manual_seed(1)
        lora = ADAPTERS["lora"].build(init_lora_weights=False, target_modules=["q_proj"])
        model = get_peft_model(load_base("awq-4"), lora, adapter_name="first")
        model.add_adapter("second", ADAPTERS["lora"].build(init_lora_weights=False, modules_to_save=["lm_head"]))
        perturb(model)
        return model

    for names in (["first"], ["second"], ["first", "second"]):
        adapted = build()
        adapted.base_model.set_adapter(names)
        expected = logits(adapted, base_tokens)
        assert relative(logits(merge_adapters(build(), adapter_names=names), base_tokens), expected) < 3e-6
    with pytest.raises(ValueError, match=r"adapter_names=\['third'\] must name adapters .* which has first, second"):
        merge_adapters(build(), adapter_names=["third"])
    with pytest.raises(TypeError, match="must be a list of names"):
        merge_adapters(build(), adapter_names="first")
    both = build()
    both.add_adapter("third", ADAPTERS["lora"].build(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"'second' and 'third' each bring a copy of lm_head"):
        merge_adapters(both, adapter_names=["second", "third"])


@pytest.mark.parametrize("kind", [name for name, row in ADAPTERS.items() if not row.merges])
def test_types_that_change_no_weight_are_refused(kind, load_base, base_tokens):
    adapted = get_peft_model(load_base("nf4-double"), ADAPTERS[kind].build())
    before = logits(adapted, base_tokens)
    with pytest.raises(ValueError, match=r"merge"):
        merge_adapters(adapted)
    assert torch.equal(logits(adapted, base_tokens), before)
    assert packed_layers(adapted)


def test_broken_adapter_changes_nothing(load_base, base_tokens):
    adapted = get_peft_model(load_base("gptq-mixed"), ADAPTERS["lora"].build(init_lora_weights=False))
    last = adapted.get_base_model().model.layers[1].mlp.down_proj.lora_B["default"].weight
    last.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"adapter 'default' holds NaN or infinity in lora_B"):
        merge_adapters(adapted)
    last.data[0, 0] = 0
    assert len(packed_layers(adapted)) == 12  # `gptq-mixed` leaves down_proj dense


def test_failure_half_way_is_taken_back(load_base, base_tokens, monkeypatch):
    adapted = get_peft_model(
        load_base("gptq-mixed"), ADAPTERS["lora"].build(init_lora_weights=False, target_modules=["lm_head", "q_proj"])
    )
    before = logits(adapted, base_tokens)

    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    broken = adapted.get_base_model().lm_head
    monkeypatch.setattr(broken, "merge", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        merge_adapters(adapted)
    assert torch.equal(logits(adapted, base_tokens), before)
    monkeypatch.undo()
    assert relative(logits(merge_adapters(adapted), base_tokens), before) < 3e-6


def test_other_models_are_refused(load_base):
    model = load_base("nf4-double")
    with pytest.raises(TypeError, match=r"takes a PEFT model .* not LlamaForCausalLM"):
        merge_adapters(model)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_merge_of_peft_before_is_noticed(load_base):
    adapted = get_peft_model(load_base("rtn-group"), ADAPTERS["ia3"].build())
    try:
        adapted.merge_adapter()
    except (RuntimeError, TypeError, ValueError):
        pass  # loud enough
    else:
        with pytest.raises(ValueError, match="Load base and adapter again"):
            merge_adapters(adapted)
