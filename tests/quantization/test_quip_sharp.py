"""QuIP# as a method: rotation, LDLQ and storage together, and its fine-tuning, on tiny models."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from hf_efficiency.calibration.engine import run_blockwise
from hf_efficiency.calibration.method import InputGroup
from hf_efficiency.quantization.hadamard import hadamard_transform
from hf_efficiency.quantization.layers.lattice import LatticeLinear, signs
from hf_efficiency.quantization.ldlq import proxy_loss
from hf_efficiency.quantization.quip_sharp import QuIPSharp, best_scale, layer_seed, rotate_hessian, rotate_weight


def group_of(*sizes, d_in=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linears = [torch.nn.Linear(d_in, d_out, bias=False) for d_out in sizes]
    for i, linear in enumerate(linears):
        linear.weight.data = (i + 1) * torch.randn(linear.weight.shape, generator=generator)
    x = torch.randn(200, d_in, generator=generator) @ torch.randn(d_in, d_in, generator=generator)
    return InputGroup([f"linear{i}" for i in range(len(sizes))], linears, x.T @ x / 200, None, {})


@torch.no_grad()
def relative_output_error(model, dense, tokens):
    ours, theirs = (m(tokens, output_hidden_states=True).hidden_states[-1] for m in (model, dense))
    return ((ours - theirs).square().sum() / theirs.square().sum()).item()


@pytest.mark.parametrize("d_in", [32, 22])  # 22 is padded to 24
def test_rotations_keep_the_output_and_the_loss(d_in):
    weight, x = torch.randn(12, d_in, dtype=torch.float64), torch.randn(50, d_in, dtype=torch.float64)
    rotated = rotate_weight(weight, 7)
    su, sv = signs(7, d_in, 12)
    rotated_x = hadamard_transform(torch.nn.functional.pad(x * sv, (0, rotated.shape[1] - d_in)))
    y = hadamard_transform(rotated_x @ rotated.T, transpose=True) * su
    torch.testing.assert_close(y, x @ weight.T)
    hessian = rotate_hessian(x.T @ x, 7)
    torch.testing.assert_close(hessian, rotated_x.T @ rotated_x)
    torch.testing.assert_close(proxy_loss(rotated, hessian), (x @ weight.T).square().sum())


def test_rotation_removes_outliers():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight[3, 5] = 100.0
    assert rotate_weight(weight, 0).abs().max() < 8


def test_best_scale_by_hand():
    target, quantized = torch.tensor([[2.0, 4.0]]), torch.tensor([[1.0, 1.0]])
    # Outputs are weighed 1 and 3: (2 * 1 + 3 * 4 * 1) / (1 + 3).
    assert best_scale(target, quantized, torch.diag(torch.tensor([1.0, 3.0]))).item() == 3.5
    assert best_scale(target, torch.zeros(1, 2), torch.eye(2)).item() == 1


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.06), (3, 0.02), (4, 0.006)])
def test_error_falls_with_bits(bits, bound):
    group = group_of(24, 40)
    dense = [linear.weight.detach().clone() for linear in group.linears]
    QuIPSharp(bits=bits).compress_group(group)
    for name, weight in zip(group.names, dense, strict=True):
        error = proxy_loss(weight - group.layers[name].dequantize(), group.hessian)
        assert error < bound * proxy_loss(weight, group.hessian)


def test_one_seed_for_the_group_and_another_for_the_next():
    group = group_of(24, 40)
    QuIPSharp(seed=3).compress_group(group)
    seeds = [int(layer.seed) for layer in group.layers.values()]
    assert seeds == [layer_seed(3, "linear0")] * 2
    assert layer_seed(3, "linear0") != layer_seed(4, "linear0") != layer_seed(4, "linear1")


def test_sweeps_lower_the_loss():
    losses = []
    for sweeps in (0, 1):
        group = group_of(64)
        dense = group.linears[0].weight.detach().clone()
        QuIPSharp(sweeps=sweeps).compress_group(group)
        losses.append(proxy_loss(dense - group.layers["linear0"].dequantize(), group.hessian).item())
    assert losses[1] < losses[0]


def test_zero_weight_and_dead_input():
    group = group_of(16)
    group.linears[0].weight.data.zero_()
    group.hessian.zero_()
    QuIPSharp().compress_group(group)
    assert group.layers["linear0"].dequantize().abs().max() < 1e-6


def test_whole_model(tiny_llama, tiny_tokens):
    dense = copy.deepcopy(tiny_llama)
    errors = []
    for bits in (2, 4):
        model = copy.deepcopy(dense)
        layers = run_blockwise(model, tiny_tokens, QuIPSharp(bits=bits), batch_size=4, progress=False)
        assert all(isinstance(model.get_submodule(name), LatticeLinear) for name in layers)
        errors.append(relative_output_error(model, dense, tiny_tokens))
    assert errors[1] < 0.2 * errors[0]


def test_same_seed_same_codes(tiny_llama, tiny_tokens):
    first, second = (
        run_blockwise(copy.deepcopy(tiny_llama), tiny_tokens, QuIPSharp(seed=5), progress=False) for _ in range(2)
    )
    assert all(torch.equal(first[name].codes, second[name].codes) for name in first)


def biased_models(vocab_size=256):
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=64,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        )
    )
    return {"gpt2": gpt2.eval(), "opt": opt.eval()}


def test_fine_tuning_lowers_the_error(tiny_llama, tiny_tokens):
    dense, plain = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    run_blockwise(plain, tiny_tokens, QuIPSharp(), progress=False)
    layers = run_blockwise(tiny_llama, tiny_tokens, QuIPSharp(fine_tune_steps=40), progress=False)
    assert relative_output_error(tiny_llama, dense, tiny_tokens) < 0.95 * relative_output_error(
        plain, dense, tiny_tokens
    )
    vectors = torch.cat([layer.su for layer in layers.values()]).float().abs()
    assert vectors.std() > 1e-3
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(tiny_llama.get_parameter(norm), dense.get_parameter(norm))
    assert all(p.grad is None for p in tiny_llama.parameters())


def test_fine_tuning_that_does_not_help_is_not_kept(tiny_llama, tiny_tokens):
    plain = copy.deepcopy(tiny_llama)
    untouched = run_blockwise(plain, tiny_tokens, QuIPSharp(), progress=False)
    settings = QuIPSharp(fine_tune_steps=2, fine_tune_learning_rate=1.0)
    layers = run_blockwise(tiny_llama, tiny_tokens, settings, progress=False)
    for name, layer in layers.items():
        assert torch.equal(layer.codes, untouched[name].codes)
        assert torch.equal(layer.dequantize(), untouched[name].dequantize())
    for name, parameter in plain.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, tiny_llama.get_parameter(name))


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_fine_tuning_with_biases_and_conv1d(name, tiny_tokens):
    dense = biased_models()[name]
    plain, tuned = copy.deepcopy(dense), copy.deepcopy(dense)
    run_blockwise(plain, tiny_tokens, QuIPSharp(), progress=False)
    layers = run_blockwise(tuned, tiny_tokens, QuIPSharp(fine_tune_steps=30), progress=False)
    assert relative_output_error(tuned, dense, tiny_tokens) < relative_output_error(plain, dense, tiny_tokens)
    assert any(layer.bias.abs().max() > 0 for layer in layers.values())


def test_fine_tuning_in_bfloat16(tiny_llama, tiny_tokens):
    model = tiny_llama.to(torch.bfloat16)
    dense = copy.deepcopy(model)
    run_blockwise(model, tiny_tokens, QuIPSharp(bits=4, fine_tune_steps=8), progress=False)
    assert relative_output_error(model, dense, tiny_tokens) < 0.05


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bits": 8}, "bits=8 has no lattice codebook: choose one of 2, 3, 4"),
        ({"damp_percent": 0.0}, "damp_percent=0.0 must lie between 0 and 1"),
        ({"sweeps": -1}, "sweeps=-1 must not be negative"),
        ({"fine_tune_steps": -2}, "fine_tune_steps=-2 must not be negative"),
        ({"fine_tune_batches": 0}, "fine_tune_batches=0 must be at least 1"),
        ({"fine_tune_learning_rate": 0.0}, "fine_tune_learning_rate=0.0 must be positive"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        QuIPSharp(**kwargs)


def test_diverging_fine_tuning_names_the_block(tiny_llama, tiny_tokens):
    with pytest.raises(ValueError, match=r"model\.layers\.0: the fine-tuning loss is .*fine_tune_learning_rate"):
        run_blockwise(
            tiny_llama,
            tiny_tokens,
            QuIPSharp(fine_tune_steps=50, fine_tune_learning_rate=1e30),
            progress=False,
        )
