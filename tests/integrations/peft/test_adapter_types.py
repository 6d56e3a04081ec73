"""Bottleneck, Compacter, SNELL, BitFit and random subspaces through everything that PEFT does with an adapter."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_efficiency import (
    BitFitConfig,
    BottleneckConfig,
    CompacterConfig,
    IntrinsicConfig,
    NF4Config,
    SNELLConfig,
    merge_adapters,
)
from tests import tiny
from tests.families import build_family
from tests.integrations.peft.conftest import logits, packed_layers, relative

TYPES = {
    "houlsby": lambda: BottleneckConfig(bottleneck_size=8, task_type="CAUSAL_LM"),
    "pfeiffer": lambda: BottleneckConfig(variant="pfeiffer", reduction_factor=4, task_type="CAUSAL_LM"),
    "parallel": lambda: BottleneckConfig(variant="parallel", bottleneck_size=8, task_type="CAUSAL_LM"),
    "bottleneck-everywhere": lambda: BottleneckConfig(target_modules="all-linear", bottleneck_size=8),
    "compacter": lambda: CompacterConfig(kronecker_n=3, bottleneck_size=8, task_type="CAUSAL_LM"),
    "snell": lambda: SNELLConfig(r=4, task_type="CAUSAL_LM"),
    "bitfit": lambda: BitFitConfig(add_bias=True, task_type="CAUSAL_LM"),
    "intrinsic": lambda: IntrinsicConfig(d=40, task_type="CAUSAL_LM"),
    "said": lambda: IntrinsicConfig(d=40, said=True, task_type="CAUSAL_LM"),
}
TOKENS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
MERGEABLE = ["snell", "bitfit", "intrinsic", "said"]


def trained(model):
    """What of an adapted model is trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def count(model):
    return sum(parameter.numel() for parameter in trained(model))


def adapt(kind, base, seed=0, **arguments):
    """An adapted model whose adapter is not at its start."""
    torch.manual_seed(seed)
    model = get_peft_model(base, TYPES[kind](), **arguments)
    shake(model, seed)
    return model


def shake(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(params=["llama", "gpt2"], scope="module")
def family(request):
    return build_family(request.param)


@pytest.fixture
def base(family):
    return copy.deepcopy(family)


@pytest.mark.parametrize("kind", TYPES)
def test_starts_as_the_model_and_trains(kind, base):
    before = logits(base, TOKENS)
    model = get_peft_model(base, TYPES[kind]())
    assert torch.equal(logits(model, TOKENS), before)
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert any(parameter.grad.any() for parameter in trained(model))
    shake(model)
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained(model))
    assert all("_adapter." in name for name, parameter in model.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize("kind", TYPES)
def test_on_a_bfloat16_model(kind):
    """Adapters are float32, what they add is not; the shared numbers serve layers that hold none."""
    model = adapt(kind, build_family("llama").to(torch.bfloat16))
    assert {parameter.dtype for parameter in trained(model)} == {torch.float32}
    output = model(input_ids=TOKENS, labels=TOKENS)
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert all(parameter.grad.any() for parameter in trained(model))
    wide = adapt(kind, build_family("llama").to(torch.bfloat16).float())
    assert relative(output.logits.detach(), logits(wide, TOKENS)) < 0.05


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_saves_and_reloads_under_another_name(kind, low_cpu_mem_usage, family, base, tmp_path):
    model = adapt(kind, base)
    expected = logits(model, TOKENS)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == count(model)  # what is shared, once
    again = PeftModel.from_pretrained(
        copy.deepcopy(family), tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    )
    assert torch.equal(logits(again, TOKENS), expected)
    assert count(again) == count(model)
    with again.disable_adapter():
        assert torch.equal(logits(again, TOKENS), logits(family, TOKENS))
    assert torch.equal(logits(copy.deepcopy(again), TOKENS), expected)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.filterwarnings("ignore:Adapter first was active:UserWarning")
def test_several_adapters(kind, family, base, tmp_path):
    model = adapt(kind, base, adapter_name="first")
    first = logits(model, TOKENS)
    torch.manual_seed(1)
    model.add_adapter("second", TYPES[kind]())
    assert torch.equal(logits(model, TOKENS), first)
    model.set_adapter("second")
    assert torch.equal(logits(model, TOKENS), logits(family, TOKENS))
    shake(model, seed=1)
    second = logits(model, TOKENS)
    model.base_model.set_adapter(["first", "second"])
    both = logits(model, TOKENS)
    assert relative(both, first) > 1e-3
    assert relative(both, second) > 1e-3
    model.set_adapter("first")
    assert torch.equal(logits(model, TOKENS), first)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    again = PeftModel.from_pretrained(copy.deepcopy(family), tmp_path / "second")
    assert torch.equal(logits(again, TOKENS), second)
    model.delete_adapter("first")
    model.set_adapter("second")
    assert torch.equal(logits(model, TOKENS), second)
    assert torch.equal(logits(model.unload(), TOKENS), logits(family, TOKENS))


@pytest.mark.parametrize("kind", MERGEABLE)
def test_merges_and_unmerges(kind):
    before = build_family("gpt2")
    model = adapt(kind, build_family("gpt2"))
    expected = logits(model, TOKENS)
    assert relative(expected, logits(before, TOKENS)) > 1e-3
    model.merge_adapter()
    assert relative(logits(model, TOKENS), expected) < 3e-6
    model.unmerge_adapter()
    assert relative(logits(model, TOKENS), expected) < 3e-6
    with model.disable_adapter():
        assert relative(logits(model, TOKENS), logits(before, TOKENS)) < 3e-6
    merged = model.merge_and_unload(safe_merge=True)
    assert relative(logits(merged, TOKENS), expected) < 3e-6
    assert not [name for name, _ in merged.named_parameters() if "adapter" in name]


@pytest.mark.parametrize("kind", sorted(set(TYPES) - set(MERGEABLE) | {"bitfit"}))
def test_what_cannot_be_merged_says_so(kind):
    model = adapt(kind, build_family("qwen2"))  # whose feed-forward has no biases to merge into
    expected = logits(model, TOKENS)
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: merge_adapters(model)):
        with pytest.raises(ValueError, match=r"cannot be merged\. Keep it as an adapter"):
            merge()
        assert torch.equal(logits(model, TOKENS), expected)


@pytest.fixture(scope="module")
def packed_gpt2(tmp_path_factory):
    """Folder of a GPT-2 in NF4: packed layers in place of transposed weights, all with biases."""
    folder = tmp_path_factory.mktemp("gpt2")
    build_family("gpt2").save_pretrained(folder / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=NF4Config())
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", TYPES)
def test_on_a_packed_gpt2(kind, packed_gpt2, our_loaders, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(packed_gpt2, dtype=torch.float32)
    assert packed_layers(base)
    before = logits(base, TOKENS)
    torch.manual_seed(0)
    model = get_peft_model(base, TYPES[kind]())
    assert torch.equal(logits(model, TOKENS), before)
    shake(model)
    expected = logits(model, TOKENS)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad.any() for parameter in trained(model))
    model.save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(packed_gpt2, dtype=torch.float32)
    again = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(logits(again, TOKENS), expected)
    if kind == "bitfit":  # its biases are dense
        again.merge_adapter()
        assert relative(logits(again, TOKENS), expected) < 3e-6
        again.unmerge_adapter()
        assert torch.equal(logits(again, TOKENS), expected)
    if kind in MERGEABLE:
        assert relative(logits(merge_adapters(again), TOKENS), expected) < 3e-6


def test_broken_biases_are_not_merged():
    model = adapt("bitfit", build_family("gpt2"))
    trained(model)[0].data.fill_(float("nan"))
    with pytest.raises(ValueError, match="'default' gives biases that are not finite: the adapter is broken"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("kind", ["houlsby", "compacter", "snell", "bitfit", "intrinsic"])
def test_modules_to_save_and_auto_class(kind, tiny_llama_dir, tmp_path):
    config = TYPES[kind]()
    config.modules_to_save = ["lm_head"]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), config)
    shake(model)
    expected = logits(model, TOKENS)
    model.save_pretrained(tmp_path)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, TOKENS), expected)


@pytest.mark.parametrize("kind", TYPES)
def test_transformers_loads_it_without_peft(kind, tiny_llama_dir, tmp_path):
    model = adapt(kind, AutoModelForCausalLM.from_pretrained(tiny_llama_dir))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), TOKENS), logits(model, TOKENS))


def test_counts_are_the_papers():
    """On a Llama of two blocks, d = 64, key and value 32, feed-forward 160."""
    linears = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 160), (64, 160), (160, 64)] * 2
    bottleneck = 2 * 8 * 64 + 64 + 8
    fast = 2 * (64 + 8) + 64 + 8
    for config, expected in [
        (BottleneckConfig(bottleneck_size=8), 2 * 2 * bottleneck),
        (BottleneckConfig(variant="pfeiffer", reduction_factor=8), 2 * bottleneck),
        (BottleneckConfig(variant="parallel", reduction_factor=8), 2 * (bottleneck + 1)),
        (CompacterConfig(bottleneck_size=8, kronecker_n=4), 2 * 2 * fast + 4**3),
        (CompacterConfig(variant="pfeiffer", bottleneck_size=8, kronecker_n=2), 2 * fast + 2**3),
        (SNELLConfig(r=6), sum(6 * (d_in + d_out) for d_in, d_out in linears)),
        (BitFitConfig(add_bias=True), sum(d_out for _, d_out in linears)),
        (IntrinsicConfig(d=77), 77),
        (IntrinsicConfig(d=77, said=True), 77),
    ]:
        assert count(get_peft_model(tiny.build_llama(), config)) == expected, config


def test_bitfit_counts_of_gpt2():
    """d = 32, feed-forward 128, two blocks: c_attn 3 d, c_proj d, c_fc, c_proj d, two norms; the last norm."""
    for config, expected in [
        (BitFitConfig(), 2 * (96 + 32 + 128 + 32 + 2 * 32) + 32),
        (BitFitConfig(biases="linear"), 2 * (96 + 32 + 128 + 32)),
        (BitFitConfig(target_modules="all-linear"), 2 * (96 + 32 + 128 + 32)),
        (BitFitConfig(biases="query_mlp"), 2 * (96 + 128)),
        (BitFitConfig(layers_to_transform=1), 96 + 32 + 128 + 32 + 2 * 32),
        (BitFitConfig(target_modules=["c_fc"]), 2 * 128),
        (BitFitConfig(exclude_modules=["c_attn"]), 2 * (32 + 128 + 32 + 2 * 32) + 32),
    ]:
        assert count(get_peft_model(build_family("gpt2"), config)) == expected, config


@pytest.mark.parametrize(("family", "names"), [("opt", {"q_proj", "fc1"}), ("phi", {"q_proj", "fc1"})])
def test_bitfit_of_queries_and_mlp(family, names):
    model = get_peft_model(build_family(family), BitFitConfig(biases="query_mlp"))
    found = {name.split(".bitfit")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert found == names


def test_bitfit_is_training_the_bias():
    """One step of SGD from the same gradient moves the same output."""
    base, plain = build_family("gpt2"), build_family("gpt2")
    model = get_peft_model(base, BitFitConfig(biases="all"))
    biases = [p for name, p in plain.named_parameters() if name.endswith("bias")]
    for part, parameters in ((model, trained(model)), (plain, biases)):
        part(input_ids=TOKENS, labels=TOKENS).loss.backward()
        torch.optim.SGD(parameters, lr=0.5).step()
    assert len(trained(model)) == len(biases)
    assert relative(logits(model, TOKENS), logits(plain, TOKENS)) < 3e-6


def test_parallel_adapter_beside_the_feed_forward_written_out():
    base = tiny.build_llama()
    model = adapt("parallel", base)
    mlp = base.model.layers[1].mlp
    adapter = mlp.down_proj.adapters["default"]
    x = torch.randn(2, 3, 64)
    hidden = torch.relu(x @ adapter.down_weight.T + adapter.down_bias)
    expected = adapter.scale * (hidden @ adapter.up_weight.T + adapter.up_bias)
    with model.disable_adapter():
        plain = mlp(x)
    torch.testing.assert_close(mlp(x), plain + expected)


def test_compacter_holds_its_slow_weights_once(tmp_path):
    model = adapt("compacter", tiny.build_llama())
    model.save_pretrained(tmp_path)
    slow = [name for name in load_file(tmp_path / "adapter_model.safetensors") if name.endswith("slow")]
    assert slow == ["base_model.model.model.layers.0.self_attn.o_proj.compacter_adapter.slow"]


@pytest.mark.parametrize("kind", ["houlsby", "parallel", "bottleneck-everywhere", "compacter", "snell", "bitfit"])
def test_blocks_are_chosen_and_places_stay(kind, tmp_path):
    config = TYPES[kind]()
    config.layers_to_transform = [1]
    model = get_peft_model(tiny.build_llama(), config)
    shake(model)
    assert {name.split("layers.")[1][0] for name, p in model.named_parameters() if p.requires_grad} == {"1"}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.build_llama(), tmp_path)
    assert torch.equal(logits(again, TOKENS), logits(model, TOKENS))


BAD_CONFIGS = [
    (BottleneckConfig, {"variant": "sideways"}, "variant='sideways' must be one of houlsby, parallel, pfeiffer"),
    (CompacterConfig, {"variant": "parallel"}, "variant='parallel' must be one of houlsby, pfeiffer"),
    (BottleneckConfig, {"reduction_factor": 0}, "reduction_factor=0 must be above 0"),
    (BottleneckConfig, {"bottleneck_size": -1}, "bottleneck_size=-1 must be above 0"),
    (BottleneckConfig, {"scale": 0.0}, "scale=0.0 must be above 0"),
    (BottleneckConfig, {"non_linearity": "step"}, "non_linearity='step' must be one of gelu, relu, silu, tanh"),
    (BottleneckConfig, {"adapter_dropout": 1.0}, r"adapter_dropout=1.0 must be in \[0, 1\)"),
    (CompacterConfig, {"kronecker_n": 0}, "kronecker_n=0 must be above 0"),
    (CompacterConfig, {"r": 0}, "r=0 must be above 0"),
    (SNELLConfig, {"r": 3}, "r=3 must be even"),
    (SNELLConfig, {"sparsity": 1.0}, r"sparsity=1.0 must be in \[0, 1\)"),
    (SNELLConfig, {"norm": 3}, "norm=3 must be 1 or 2"),
    (SNELLConfig, {"scale": -1.0}, "scale=-1.0 must be above 0"),
    (BitFitConfig, {"biases": "some"}, "biases='some' must be one of all, linear, query_mlp"),
    (IntrinsicConfig, {"d": 0}, "d=0 must be above 0"),
]


@pytest.mark.parametrize(("config", "arguments", "message"), BAD_CONFIGS)
def test_bad_configs(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        config(**arguments)


BAD_PLACES = [
    (BottleneckConfig(bottleneck_size=65), r"bottleneck_size=65 gives .*, of width 64, .* lies between 1 and 64"),
    (BottleneckConfig(reduction_factor=65), r"reduction_factor=65 gives .* a bottleneck of width 0"),
    (CompacterConfig(bottleneck_size=4, kronecker_n=5), "kronecker_n=5 is above 4, the width of the bottleneck of"),
    (CompacterConfig(bottleneck_size=4, r=2), "r=2 is above 1, the rank of the fast weights of .*wider bottleneck"),
    (SNELLConfig(r=34), r"r=34 is above 32, the rank of model.layers.0.self_attn.k_proj \(32 x 64\)"),
    (IntrinsicConfig(d=10**9), "d=1000000000 is above 86016, the number of weights that are adapted"),
    (IntrinsicConfig(d=14, said=True), "d=14 leaves nothing to share, for each of the 14 layers"),
    (
        BitFitConfig(),
        r"LlamaForCausalLM has no biases to train \(biases='all'\): add_bias=True gives",
    ),
    (BitFitConfig(target_modules=["q_proj"]), "q_proj has no bias to train: leave it out, or .*add_bias=True"),
    (BitFitConfig(target_modules=["embed_tokens"], add_bias=True), "embed_tokens has no bias to train"),
    (BottleneckConfig(target_modules=["q_porj"]), "match no layer of the model. Did you mean .*q_proj"),
    (CompacterConfig(target_modules=["down_prjo"]), "match no layer of the model. Did you mean down_proj"),
    (SNELLConfig(target_modules=["v_prj"]), "match no layer of the model. Did you mean .*v_proj"),
    (BitFitConfig(target_modules=["k_poj"], add_bias=True), "match no layer of the model. Did you mean .*k_proj"),
    (IntrinsicConfig(target_modules=["gate_prj"]), "match no layer of the model. Did you mean gate_proj"),
    (BottleneckConfig(target_modules=["embed_tokens"]), "BOTTLENECK adapts linear layers, and .* is a Embedding"),
    (
        BottleneckConfig(variant="parallel", target_modules=["q_proj"]),
        "projection of a feed-forward, and .*none",
    ),
    (
        BottleneckConfig(layers_to_transform=[5]),
        r"layers_to_transform=\[5\] names no block of the model",
    ),
]


@pytest.mark.parametrize(("config", "message"), BAD_PLACES)
def test_bad_places_leave_the_model_alone(config, message):
    model = tiny.build_llama()
    modules = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, copy.deepcopy(config))
    assert [(name, type(module)) for name, module in model.named_modules()] == modules


def test_mixture_of_experts_has_no_place_for_bottlenecks():
    with pytest.raises(ValueError, match="is a mixture of experts and has no single output projection"):
        get_peft_model(build_family("mixtral"), BottleneckConfig())
    model = get_peft_model(build_family("mixtral"), BottleneckConfig(target_modules=["o_proj"], bottleneck_size=4))
    assert count(model) == 2 * (2 * 4 * 32 + 32 + 4)


@pytest.mark.parametrize(
    ("saved", "here"),
    [
        (CompacterConfig(kronecker_n=2, bottleneck_size=8), {"hidden_size": 32}),
        (BottleneckConfig(bottleneck_size=8), {"num_hidden_layers": 1}),
        (SNELLConfig(r=4), {"intermediate_size": 96}),
        (IntrinsicConfig(d=40, said=True), {"num_hidden_layers": 1}),
    ],
)
def test_adapters_of_other_bases_are_refused(saved, here, tmp_path):
    get_peft_model(tiny.build_llama(), copy.deepcopy(saved)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the adapter was made for another model or config"):
        PeftModel.from_pretrained(tiny.build_llama(**here), tmp_path)


def test_a_second_adapter_has_a_config_of_its_own():
    """Its seed, dimension and bounds, not those of the first; and one that is refused leaves no trace."""
    model = get_peft_model(tiny.build_llama(), IntrinsicConfig(d=40), adapter_name="first")
    model.add_adapter("second", IntrinsicConfig(d=50, projection_prng_key=1))
    model.set_adapter("second")
    assert count(model) == 50
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="d=1000000000 is above"):
        model.add_adapter("third", IntrinsicConfig(d=10**9))
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.peft_config) == ["first", "second"]
