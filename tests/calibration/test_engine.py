"""The engine against the models' own forward passes, on many families, and its options against each other.

Shape legend: n sequences, t tokens, d features.
"""

import copy
import logging
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_efficiency import GPTQConfig
from hf_efficiency.calibration import BlockMethod, run_blockwise
from hf_efficiency.calibration.structure import find_blocks, fused_weights, is_linear, linears_of, set_weight_
from hf_efficiency.quantization.gptq import GPTQ
from hf_efficiency.quantization.layers.base import QuantizedLinear
from tests.families import FAMILIES, build_family


@dataclass
class Watch(BlockMethod):
    """Changes nothing and writes down what it is shown; with `zero`, blanks every weight it has seen."""

    statistics = frozenset({"hessian", "abs_mean"})
    zero: bool = False
    true_sequential: bool = True
    inputs: dict = field(default_factory=dict)
    targets: dict = field(default_factory=dict)
    hessians: dict = field(default_factory=dict)
    abs_means: dict = field(default_factory=dict)
    groups: list = field(default_factory=list)

    @property
    def keep_dense(self):
        return True

    def start_block(self, ctx):
        self.inputs[ctx.name] = torch.cat([x.clone() for x in ctx.inputs])
        self.targets[ctx.name] = torch.cat([x.clone() for x in ctx.targets])

    def compress_group(self, group):
        self.groups.append([name.split(".", 3)[-1] for name in group.names])
        for name, linear in zip(group.names, group.linears, strict=True):
            self.hessians[name], self.abs_means[name] = group.hessian, group.abs_mean
            if self.zero:
                set_weight_(linear, torch.zeros(()))


@dataclass(kw_only=True)
class Interrupted(GPTQ):
    """GPTQ that is interrupted when it comes to a layer."""

    at: str = "nowhere"

    def compress_group(self, group):
        if self.at in group.names:
            raise KeyboardInterrupt
        super().compress_group(group)


@pytest.fixture(scope="module")
def tokens():
    """(5, 24)."""
    return torch.randint(3, 256, (5, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def llama():
    """Shared: copy before changing anything."""
    return build_family("llama")


def run(model, tokens, method, **options):
    return run_blockwise(model, tokens, method, **{"progress": False, **options})


@torch.no_grad()
def observed(model, tokens):
    """By plain hooks on one forward pass: blocks' inputs and outputs, linears' mean x xᵀ and mean |x|, all by name."""
    prefix, blocks = find_blocks(model)
    inputs, outputs, hessians, abs_means = {}, {}, {}, {}

    def on_block(name):
        def hook(module, args, kwargs, output):
            inputs[name] = args[0] if args else kwargs["hidden_states"]
            outputs[name] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    def on_linear(name):
        def hook(module, args):
            x = args[0].flatten(0, -2).double()
            hessians[name], abs_means[name] = x.T @ x / len(x), x.abs().mean(0)

        return hook

    handles = [b.register_forward_hook(on_block(f"{prefix}.{i}"), with_kwargs=True) for i, b in enumerate(blocks)]
    handles += [m.register_forward_pre_hook(on_linear(n)) for n, m in linears_of(prefix, blocks).items()]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs, outputs, hessians, abs_means


def assert_equal_by_name(found, expected, rtol=1e-4, atol=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.to(found[name].dtype), rtol=rtol, atol=atol)


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def hooks_of(model):
    return [hook for m in model.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]


@pytest.mark.parametrize("family", FAMILIES)
def test_doing_nothing_is_the_models_own_forward(family, tokens):
    """Hidden states, Hessians and mean |x| are those of one plain pass, though the batch is cut in 2, 2 and 1."""
    model, watch = build_family(family), Watch()
    inputs, outputs, hessians, abs_means = observed(model, tokens)
    before = logits(model, tokens)
    assert run(model, tokens, watch, batch_size=2) == {}
    assert_equal_by_name(watch.inputs, inputs)
    assert_equal_by_name(watch.targets, outputs)
    assert_equal_by_name(watch.hessians, hessians)
    assert_equal_by_name(watch.abs_means, abs_means)
    assert torch.equal(logits(model, tokens), before)
    assert not hooks_of(model)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "llama",
            [
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                ["self_attn.o_proj"],
                ["mlp.gate_proj", "mlp.up_proj"],
                ["mlp.down_proj"],
            ],
        ),
        ("gpt2", [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]),
        # Attention and MLP read one norm's output.
        (
            "phi",
            [
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"],
                ["self_attn.dense"],
                ["mlp.fc2"],
            ],
        ),
        ("mixtral", [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]),
    ],
)
def test_layers_with_one_input_are_one_group(family, expected, tokens):
    watch = Watch()
    run(build_family(family), tokens, watch)
    assert watch.groups == [*expected, *expected]


@pytest.mark.parametrize("family", FAMILIES)
def test_gptq_end_to_end(family, tokens, tmp_path, caplog):
    dense = build_family(family)
    dense.save_pretrained(tmp_path / "dense")
    config = GPTQConfig(
        bits=8, group_size=16, calibration=tokens, num_samples=5, seq_len=24, batch_size=2, progress=False
    )
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    prefix, blocks = find_blocks(dense)
    names = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert names == set(linears_of(prefix, blocks))
    expected = logits(dense, tokens)
    assert (logits(model, tokens) - expected).norm() < 0.02 * expected.norm()
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert_dense_again(again.dequantize(), dense)
    warned = [r.getMessage() for r in caplog.records if "fused expert" in r.getMessage()]
    assert len(warned) == bool(fused_weights(blocks))
    if family == "mixtral":
        assert "model.layers.0.mlp.experts.gate_up_proj" in warned[0]


def assert_dense_again(model, dense):
    def kinds(of):  # subclasses that compute the same come back as plain ones
        return {
            name: nn.Linear if isinstance(module, nn.Linear) else type(module)
            for name, module in of.named_modules()
            if is_linear(module)
        }

    assert kinds(model) == kinds(dense)
    for name, parameter in dense.named_parameters():
        assert (model.get_parameter(name) - parameter).norm() < 0.02 * parameter.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mixtral"])
def test_batch_size_does_not_matter(family, tokens):
    found = []
    for batch_size in (1, 4):
        watch = Watch()
        run(build_family(family), tokens, watch, batch_size=batch_size)
        found.append(watch)
    assert_equal_by_name(found[0].hessians, found[1].hessians)
    assert_equal_by_name(found[0].inputs, found[1].inputs)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("refine_steps", [0, 2])
def test_offload_changes_nothing(offload, refine_steps, llama, tokens):
    models = [copy.deepcopy(llama) for _ in range(2)]
    for model, where in zip(models, ("none", offload), strict=True):
        method = GPTQ(group_size=16, refine_steps=refine_steps, refine_lr=0.01)
        run(model, tokens, method, offload=where, batch_size=2)
    assert torch.equal(logits(models[0], tokens), logits(models[1], tokens))


def test_later_groups_see_compressed_earlier_ones(llama, tokens):
    dense = observed(llama, tokens)[2]
    watch = Watch(zero=True)
    run(copy.deepcopy(llama), tokens, watch)
    first = "model.layers.0."
    torch.testing.assert_close(watch.hessians[first + "self_attn.q_proj"], dense[first + "self_attn.q_proj"].float())
    # v_proj is zero by now, and so is what o_proj reads; down_proj likewise.
    assert not watch.hessians[first + "self_attn.o_proj"].any()
    assert not watch.hessians[first + "mlp.down_proj"].any()
    # Blank blocks add nothing to the residual stream.
    torch.testing.assert_close(watch.inputs["model.layers.1"], watch.inputs["model.layers.0"])
    # The dense stream goes on beside it.
    torch.testing.assert_close(watch.targets["model.layers.1"], observed(llama, tokens)[1]["model.layers.1"])


def test_without_true_sequential_a_block_sees_itself_dense(llama, tokens):
    dense = observed(llama, tokens)[2]
    watch = Watch(zero=True, true_sequential=False)
    run(copy.deepcopy(llama), tokens, watch)
    first = {name: h for name, h in watch.hessians.items() if name.startswith("model.layers.0.")}
    assert_equal_by_name(first, {name: dense[name] for name in first})
    # But the next block sees what the blank one gives.
    torch.testing.assert_close(watch.inputs["model.layers.1"], watch.inputs["model.layers.0"])


def test_skipped_layers_stay(llama, tokens):
    model = copy.deepcopy(llama)
    skip = {name for name in linears_of("model.layers", model.model.layers) if "self_attn" in name or ".1." in name}
    layers = run(model, tokens, GPTQ(group_size=16), skip=skip)
    assert sorted(layers) == [f"model.layers.0.mlp.{n}_proj" for n in ("down", "gate", "up")]
    for name in skip:
        assert torch.equal(model.get_submodule(name).weight, llama.get_submodule(name).weight)


@pytest.mark.parametrize("training", [False, True])
def test_model_is_left_as_it_was_found(llama, tokens, training, capfd):
    model = copy.deepcopy(llama).train(training)
    run(model, tokens, GPTQ(group_size=16))
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())
    assert not hooks_of(model)
    assert capfd.readouterr() == ("", "")


def test_progress_bar(llama, tokens, capfd):
    run(copy.deepcopy(llama), tokens, Watch(), progress=True)
    assert "Compressing blocks: 100%" in capfd.readouterr().err


def test_statistics_of_a_bfloat16_model_are_float32(llama, tokens):
    watch = Watch()
    run(copy.deepcopy(llama).to(torch.bfloat16), tokens, watch)
    assert {h.dtype for h in watch.hessians.values()} == {torch.float32}
    dense = observed(llama, tokens)[2]
    assert_equal_by_name(watch.hessians, dense, rtol=0.1, atol=0.05)


def test_interruption_leaves_no_hooks(llama, tokens):
    model = copy.deepcopy(llama)
    with pytest.raises(KeyboardInterrupt):
        run(model, tokens, Interrupted(group_size=16, at="model.layers.1.mlp.down_proj"), batch_size=2)
    assert not hooks_of(model)
    logits(model, tokens)


def test_nan_in_a_weight_names_the_layer(llama, tokens):
    model = copy.deepcopy(llama)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"weight of model\.layers\.1\.mlp\.up_proj holds NaN or infinity"):
        run(model, tokens, GPTQ(group_size=16))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_activations_names_the_layer(llama, tokens, value):
    model = copy.deepcopy(llama)
    model.model.layers[1].input_layernorm.weight.data[5] = value
    with pytest.raises(ValueError, match=r"input of model\.layers\.1\.self_attn\.q_proj is not finite .*bfloat16"):
        run(model, tokens, GPTQ(group_size=16))


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 0), (1, 2, 3)])
def test_tokens_of_a_wrong_shape(llama, shape):
    with pytest.raises(ValueError, match=rf"matrix \(sequences, tokens\), got shape \({shape[0]},"):
        run(llama, torch.zeros(shape, dtype=torch.long), Watch())


def test_bad_options(llama, tokens):
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        run(llama, tokens, Watch(), batch_size=0)
    with pytest.raises(ValueError, match="offload='tape' is unknown: choose one of none, cpu, disk"):
        run(llama, tokens, Watch(), offload="tape")
    with pytest.raises(ValueError, match="Every linear layer is excluded"):
        run(llama, tokens, Watch(), skip=set(linears_of("model.layers", llama.model.layers)))


class NoLinears(nn.Module):
    """Blocks, but nothing to compress."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])


class Recurrent(nn.Module):
    """Calls its only block twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])

    def forward(self, input_ids, use_cache=False):
        return self.blocks[0](self.blocks[0](self.embed(input_ids)))


def test_models_that_can_not_be_calibrated(tokens):
    with pytest.raises(ValueError, match="NoLinears has no list of blocks with linear layers"):
        run(NoLinears(), tokens, Watch())
    with pytest.raises(ValueError, match=r"Recurrent called 2 of its 1 blocks .* exactly once"):
        run(Recurrent(), tokens, Watch())


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class WithMore(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(()))


def test_subclasses_of_linear_count_only_where_they_compute_the_same():
    falcon = build_family("falcon")
    assert len(linears_of(*find_blocks(falcon))) == 8
    assert not is_linear(Doubled(4, 4))
    assert not is_linear(WithMore(4, 4))
    assert not is_linear(nn.MultiheadAttention(4, 2).out_proj)
    state = torch.get_rng_state()
    with torch.device("meta"):
        assert is_linear(type(falcon.transformer.h[0].mlp.dense_h_to_4h)(4, 4))
    assert torch.equal(torch.get_rng_state(), state)
