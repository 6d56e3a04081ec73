"""What all our types of linear adapters share, each on a small model: PEFT's own calls, bases, and what is refused."""

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_efficiency import AdaDoRAConfig, DVoRAConfig, DyLoRAConfig, SoRAConfig
from tests import tiny
from tests.families import build_family
from tests.integrations.peft.conftest import logits, packed_layers
from tests.methods import STORAGES

KINDS = {
    "dvora": (DVoRAConfig, {"r": 8}),
    "sora": (SoRAConfig, {"r": 4}),
    "dylora": (DyLoRAConfig, {"r": 4, "used_rank": 2}),
    "adadora": (AdaDoRAConfig, {"init_r": 4, "target_r": 2}),
}
KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(3))


def config(kind, **arguments):
    build, defaults = KINDS[kind]
    return build(**{"task_type": "CAUSAL_LM", **defaults, **arguments})


def randomize(model, name="default", seed=0):
    """Moves an adapter away from where it starts, so that it changes what the model computes."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f"_adapter.{name}." in key:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def adapt(kind, base=None, **arguments):
    torch.manual_seed(0)
    return randomize(get_peft_model(base or tiny.build_llama(), config(kind, **arguments)))


@KIND
def test_starts_as_the_model(kind, tokens):
    base = tiny.build_llama()
    before = logits(base, tokens)
    torch.testing.assert_close(logits(get_peft_model(base, config(kind)), tokens), before, atol=1e-4, rtol=1e-4)


@KIND
def test_saves_loads_and_switches_off(kind, tokens, tmp_path):
    model, plain = adapt(kind), logits(tiny.build_llama(), tokens)
    expected = logits(model, tokens)
    assert not torch.allclose(expected, plain, atol=1e-2)
    tiny.build_llama().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny.build_llama(), tmp_path / "adapter")
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(logits(loaded, tokens), expected)
    low = PeftModel.from_pretrained(tiny.build_llama(), tmp_path / "adapter", low_cpu_mem_usage=True)
    assert torch.equal(logits(low, tokens), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), tokens), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), tokens), expected)
    again = PeftModel.from_pretrained(tiny.build_llama(), tmp_path / "adapter", is_trainable=True)
    trained = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, tokens), plain)
    assert torch.equal(logits(loaded, tokens), expected)


@KIND
def test_merges_and_unmerges(kind, tokens):
    model, plain = adapt(kind), tiny.build_llama()
    expected = logits(model, tokens)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, tokens), expected, atol=2e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, tokens), expected, atol=2e-4, rtol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, tokens), logits(plain, tokens), atol=2e-4, rtol=1e-4)
    merged = model.merge_and_unload()
    assert type(merged) is type(plain)
    torch.testing.assert_close(logits(merged, tokens), expected, atol=2e-4, rtol=1e-4)


@KIND
def test_merging_a_broken_adapter_is_refused(kind):
    model = adapt(kind)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    weight = layer.base_layer.weight.clone()
    next(layer.adapters["default"].parameters()).data[:] = torch.nan
    with pytest.raises(ValueError, match="'default' gives weights that are not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)


@KIND
def test_several_adapters(kind, tokens, tmp_path):
    """Of other targets and another rank; each alone gives what it gives on a model of its own."""
    ranks = {"init_r": 3} if kind == "adadora" else {"r": 3}
    model = adapt(kind)
    first = logits(model, tokens)
    model.add_adapter("second", config(kind, target_modules=["q_proj", "down_proj"], **ranks))
    randomize(model, "second", seed=1)
    assert torch.equal(logits(model, tokens), first)
    model.set_adapter("second")
    second = logits(model, tokens)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build_llama(), tmp_path / "second", adapter_name="other")
    assert torch.equal(logits(loaded, tokens), second)
    loaded.load_adapter(tmp_path, "third")
    loaded.set_adapter("third")
    assert torch.equal(logits(loaded, tokens), first)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, tokens)
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, second)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model, tokens), first)
    assert not any(".second." in name for name in model.state_dict())


@KIND
def test_chosen_layers(kind):
    def names(**arguments):
        model = get_peft_model(tiny.build_llama(), config(kind, **arguments))
        return set(model.base_model.targeted_module_names)

    layers = {f"model.layers.{i}." for i in range(2)}
    linear = {f"self_attn.{p}_proj" for p in "qkvo"} | {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    assert names() == {layer + name for layer in layers for name in linear}
    assert names(exclude_modules=["q_proj"]) == names() - {layer + "self_attn.q_proj" for layer in layers}
    assert names(target_modules=["q_proj", "v_proj"], layers_to_transform=[1]) == {
        "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
    }  # fmt: skip
    assert names(target_modules=r".*\.0\..*up_proj") == {"model.layers.0.mlp.up_proj"}


@KIND
def test_modules_to_save(kind, tokens, tmp_path):
    model = adapt(kind, modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert head.requires_grad
    head.data += 1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build_llama(), tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


@KIND
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt", "falcon"])
def test_families(kind, family, tokens, tmp_path):
    """GPT-2 has transposed weights, Gemma a tied head and wide heads, OPT biases, Falcon its own linear class."""
    ranks = {"init_r": 3} if kind == "adadora" else {"r": 3, **({"used_rank": 2} if kind == "dylora" else {})}
    model = adapt(kind, build_family(family), **ranks)
    expected = logits(model, tokens)
    assert (expected - logits(build_family(family), tokens)).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build_family(family), tmp_path), tokens), expected)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), expected, atol=5e-4, rtol=5e-4)


@KIND
def test_bfloat16_base(kind, tokens):
    """The adapter is trained in float32; the model's outputs stay bfloat16."""
    model = adapt(kind, tiny.build_llama().bfloat16())
    out = model(input_ids=tokens, labels=tokens)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in trained)


@KIND
@pytest.mark.parametrize("method", STORAGES)
def test_quantized_base(kind, method, load_base, tokens):
    """Computes what it does on the dequantized weights, which stay packed."""
    base = load_base(method)
    dense = copy.deepcopy(base)
    for name, layer in packed_layers(dense).items():
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight.data = layer.dequantize().float()
        dense.set_submodule(name, linear)
    model = adapt(kind, base)
    torch.testing.assert_close(logits(model, tokens), logits(adapt(kind, dense), tokens), atol=2e-3, rtol=2e-3)
    with pytest.raises(ValueError, match=r"quantized layer .* use hf_efficiency.merge_adapters"):
        model.merge_adapter()


@KIND
def test_refused_config_leaves_the_model_as_it_was(kind):
    ranks = "init_r" if kind == "adadora" else "r"
    bad = {
        "match no layer of the model. Did you mean o_proj, q_proj, v_proj?": {"target_modules": ["q_prj"]},
        "Its linear layers are called": {"target_modules": ["xyz"]},
        "adapts linear layers, and model.embed_tokens is a Embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    }
    if kind != "dvora":  # whose rank may be large
        bad["is above 32, the rank of model.layers.0.self_attn.k_proj"] = {ranks: 33}
    for message, arguments in bad.items():
        base = tiny.build_llama()
        state, modules = copy.deepcopy(base.state_dict()), [type(m) for m in base.modules()]
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, config(kind, **arguments))
        assert [type(m) for m in base.modules()] == modules
        assert all(torch.equal(state[name], value) for name, value in base.state_dict().items())
        assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("dvora", {"r": 0}, "DVoRAConfig: r=0 must be above 0"),
        ("dvora", {"d_initial": -1.0}, "d_initial=-1.0 must be above 0"),
        ("dvora", {"dvora_dropout": 1.0}, r"dvora_dropout=1.0 must be in \[0, 1\)"),
        ("dvora", {"layers_pattern": "layers"}, "layers_pattern without layers_to_transform"),
        ("dvora", {"target_modules": ".*q", "layers_to_transform": [0]}, "does not go with a regular expression"),
        ("sora", {"sparse_lambda": 0.0}, "sparse_lambda=0.0 must be above 0"),
        ("sora", {"sora_dropout": -0.1}, r"sora_dropout=-0.1 must be in \[0, 1\)"),
        ("dylora", {"min_rank": 9, "r": 8}, "min_rank=9 must be between 1 and r=8"),
        ("dylora", {"used_rank": 0}, "used_rank=0 must be between 1 and r=4"),
        ("adadora", {"target_r": 5}, "target_r=5 must be at most init_r=4"),
        ("adadora", {"importance": "size"}, "importance='size' must be one of sensitivity, gradient_norm, magnitude"),
        ("adadora", {"tinit": -1}, "tinit=-1 must not be below 0"),
        ("adadora", {"beta1": 1.0}, r"beta1=1.0 must be in \[0, 1\)"),
    ],
)
def test_bad_configs(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        config(kind, **arguments)


@KIND
def test_adapter_of_another_base_is_refused(kind, tmp_path):
    adapt(kind, target_modules=["q_proj", "up_proj"]).save_pretrained(tmp_path)
    for message, sizes in {
        r"\d+ tensors have another shape .* saved, .* here": {"intermediate_size": 96},
        r"\d+ tensors are missing from it": {"num_hidden_layers": 3},
        r"\d+ of its tensors belong to layers that are not adapted here": {"num_hidden_layers": 1},
    }.items():
        with pytest.raises(ValueError, match=f"the adapter was made for another model or config: {message}"):
            PeftModel.from_pretrained(tiny.build_llama(**sizes), tmp_path)


def test_types_are_registered_when_a_script_imports_peft():
    """And not earlier. The other order is that of this file."""
    script = """
    import sys, hf_efficiency
    assert "peft" not in sys.modules
    from peft import mapping
    assert {"DVORA", "SORA", "DYLORA", "ADADORA"} <= set(mapping.PEFT_TYPE_TO_TUNER_MAPPING)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
