"""Every method crossed with what a model must do: save and reload, dequantize, generate, train an adapter."""

import copy
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_efficiency.evaluation.footprint import bits_per_weight
from hf_efficiency.quantization.layers.base import QuantizedLinear
from tests import tiny
from tests.methods import METHODS, STORAGES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDING = {"float32": 2e-5, "bfloat16": 0.1}
WIDTHS = [(dtype, tied) for dtype in DTYPES for tied in (False, True)]

pytestmark = pytest.mark.usefixtures("our_loaders")


@pytest.fixture(scope="module")
def tokens():
    """(4, 24): enough for tiny statistics."""
    return torch.randint(3, 256, (4, 24), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The folder of the dense model."""

    @cache
    def folder(tied: bool) -> Path:
        path = tmp_path_factory.mktemp("dense")
        tiny.build_llama(tie_word_embeddings=tied).save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, dense, tokens):
    """The quantized model and the folder it was saved to. Shared: copy before changing anything."""

    @cache
    def build(method: str, dtype: str = "float32", tied: bool = False):
        model = AutoModelForCausalLM.from_pretrained(
            dense(tied), dtype=DTYPES[dtype], quantization_config=METHODS[method].build(tokens)
        )
        path = tmp_path_factory.mktemp(method)
        model.save_pretrained(path)
        return model, path

    return build


@torch.no_grad()
def logits(model, tokens):
    return model.eval()(tokens).logits


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def storage_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def same_tensors(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype and torch.equal(first[k], second[k]) for k in first
    )


@pytest.mark.parametrize(("dtype", "tied"), WIDTHS)
@pytest.mark.parametrize("method", METHODS)
def test_reload_is_bit_identical(method, dtype, tied, quantized, tokens):
    model, folder = quantized(method, dtype, tied)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert storage_layers(again).keys() == storage_layers(model).keys() != set()
    assert again.dtype == model.dtype == DTYPES[dtype]
    assert same_tensors(again, model)
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize("method", METHODS)
def test_close_to_the_dense_model(method, quantized, dense, tokens):
    original = AutoModelForCausalLM.from_pretrained(dense(False))
    error = relative(logits(quantized(method)[0], tokens), logits(original, tokens))
    assert 0 < error < METHODS[method].error


@pytest.mark.parametrize("method", METHODS)
def test_head_embeddings_and_norms_stay(method, quantized, dense):
    model = quantized(method, tied=True)[0]
    original = AutoModelForCausalLM.from_pretrained(dense(True))
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert torch.equal(model.model.norm.weight, original.model.norm.weight)


@pytest.mark.parametrize("method", METHODS)
def test_reloaded_model_saves_the_same_again(method, quantized, tmp_path):
    model, folder = quantized(method)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_dequantize_gives_a_plain_model(method, dtype, quantized, tokens, tmp_path):
    model, folder = quantized(method, dtype)
    plain = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    assert not storage_layers(plain)
    error = relative(logits(plain, tokens), logits(model, tokens))
    assert error < ROUNDING[dtype]
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(type(module) is nn.Linear for module in again.modules() if isinstance(module, nn.Linear))
    assert torch.equal(logits(again, tokens), logits(plain, tokens))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_generates(method, dtype, quantized, tokens):
    model = quantized(method, dtype)[0]
    out = model.generate(tokens[:, :5], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (4, 9)
    if dtype == "float32":  # with a cache as without
        for length in range(5, 9):
            assert torch.equal(logits(model, out[:, :length])[:, -1].argmax(-1), out[:, length])


@pytest.mark.parametrize("method", METHODS)
def test_adapter_trains(method, quantized, tokens):
    torch.manual_seed(0)
    model = copy.deepcopy(quantized(method)[0])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=targets, lora_alpha=8)).train()
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = peft(input_ids=tokens, labels=tokens).loss
        loss.backward()
        gradients = {n: p.grad for n, p in peft.named_parameters() if p.requires_grad}
        # The first step moves B only (A's gradient passes through B = 0): B of the first block proves the flow.
        assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
        assert all(g.abs().max() > 0 for n, g in gradients.items() if "lora_B" in n)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = {k.removeprefix("base_model.model.").replace(".base_layer", ""): v for k, v in peft.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("method", STORAGES)
def test_merging_into_packed_weights_fails_loudly(method, quantized):
    model = copy.deepcopy(quantized(method)[0])
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        peft.merge_and_unload()


@pytest.mark.parametrize(
    ("method", "dtype"), [*((method, "float32") for method in STORAGES), ("rtn-group", "bfloat16")]
)
def test_compiles_without_graph_breaks(method, dtype, quantized, tokens):
    model = quantized(method, dtype)[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_that_of_the_dequantized_model(method, quantized, tokens):
    model, folder = quantized(method)
    plain = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    gradients = []
    for each in (model, plain):
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        each(inputs_embeds=embedded, labels=tokens).loss.backward()
        gradients.append(embedded.grad)
        each.zero_grad(set_to_none=True)
    error = relative(*gradients)
    assert error < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_bits_per_weight(method, quantized):
    model = quantized(method)[0]
    sizes = {n: (n, m.in_features, m.out_features) for n, m in storage_layers(model).items()}
    numel = {n: d_in * d_out for n, (_, d_in, d_out) in sizes.items()}
    expected = sum(METHODS[method].formula(*sizes[n]) * numel[n] for n in sizes) / sum(numel.values())
    assert bits_per_weight(model).quantized == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_config_holds_no_data(method, quantized, tokens):
    model, folder = quantized(method)
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    text = json.dumps(stored)
    assert "calibration" not in text
    assert "tokenizer" not in text
    assert str(tokens[0, :3].tolist())[1:-1] not in text
    assert not isinstance(model.config.quantization_config.calibration, torch.Tensor)


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
@pytest.mark.parametrize("method", STORAGES)
def test_device_maps(method, device_map, quantized, dense, tokens):
    model, folder = quantized(method)
    expected = logits(model, tokens)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, device_map=device_map), tokens), expected)
    fresh = AutoModelForCausalLM.from_pretrained(
        dense(False), quantization_config=METHODS[method].build(tokens), device_map=device_map
    )
    assert torch.equal(logits(fresh, tokens), expected)


@pytest.mark.parametrize("method", STORAGES)
def test_sharded_checkpoint(method, quantized, tokens, tmp_path):
    model = quantized(method)[0]
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), logits(model, tokens))


@pytest.mark.parametrize("method", STORAGES)
def test_config_as_a_dict(method, quantized, dense, tokens):
    model = quantized(method)[0]
    config = METHODS[method].build(tokens)
    given = {"quant_method": config.default_name, **METHODS[method].arguments}
    if METHODS[method].calibrated:
        names = ("calibration", "num_samples", "seq_len", "batch_size", "progress")
        given |= {name: getattr(config, name) for name in names}
    fresh = AutoModelForCausalLM.from_pretrained(dense(False), quantization_config=given)
    assert torch.equal(logits(fresh, tokens), logits(model, tokens))
