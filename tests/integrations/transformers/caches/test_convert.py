"""Multi-head into grouped-query attention."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_efficiency import RTNConfig
from hf_efficiency.integrations.transformers.caches import convert_attention, make_cache
from tests import tiny
from tests.families import build_family


@pytest.fixture(scope="module")
def tokens():
    """Counting up by a step of each row's own: something that can be learned."""
    rows = torch.arange(24).view(-1, 1) * 13 + torch.arange(33) * (1 + torch.arange(24).view(-1, 1) % 3)
    return rows % 380 + 3


def test_heads_that_are_alike_lose_nothing(tokens):
    """Where the heads of a group are the same, their mean is each of them."""
    model = tiny.build_llama(num_key_value_heads=2)
    wide = tiny.build_llama(num_key_value_heads=4)
    state = model.state_dict()
    for name in list(state):
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].view(2, 16, 64).repeat_interleave(2, 0).reshape(64, 64)
    wide.load_state_dict(state)
    ids = tokens[:2, :9]
    before = wide(ids).logits
    torch.testing.assert_close(before, model(ids).logits, atol=1e-5, rtol=1e-5)
    report = convert_attention(wide, 2, calibration=tokens, seq_len=16)
    torch.testing.assert_close(wide(ids).logits, before, atol=1e-5, rtol=1e-5)
    assert (report.heads_before, report.heads_after, report.cache_ratio) == (4, 2, 0.5)
    assert report.loss_before == pytest.approx(report.loss_converted, abs=1e-4)
    assert report.loss_after == report.loss_converted


def test_uptraining_lowers_the_loss_and_the_result_is_an_ordinary_checkpoint(tokens, tmp_path):
    model = tiny.build_llama(num_key_value_heads=4)
    norm = model.model.norm.weight.clone()
    report = convert_attention(model, 1, calibration=tokens, seq_len=32, steps=30, learning_rate=1e-2)
    assert report.loss_converted != pytest.approx(report.loss_before, abs=1e-3)
    assert report.loss_after < report.loss_converted - 0.05
    assert torch.equal(norm, model.model.norm.weight)
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_key_value_heads == 1
    ids = tokens[:2, :9]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    cache = make_cache("h2o", loaded, budget=5)
    loaded.generate(ids, past_key_values=cache, max_new_tokens=3)
    assert cache.layers[0].slots.keys.shape[1] == 1


def test_biases_are_pooled_too(tokens):
    model = build_family("qwen2")
    ids = tokens[:2, :9] % 250
    twin = copy.deepcopy(model)
    convert_attention(model, 1, calibration=tokens % 250, seq_len=16)
    bias = twin.model.layers[0].self_attn.v_proj.bias
    torch.testing.assert_close(model.model.layers[0].self_attn.v_proj.bias, bias.view(2, 8).mean(0))
    assert model(ids).logits.shape == twin(ids).logits.shape


@pytest.mark.parametrize(
    ("build", "heads", "options", "says"),
    [
        (tiny.build_llama, 3, {}, "num_key_value_heads is 3: choose a divisor of the model's 2 heads"),
        (tiny.build_llama, 0, {}, "num_key_value_heads is 0"),
        (tiny.build_llama, 1, {"steps": -1}, "steps=-1, batch_size=4"),
        (lambda: build_family("gpt2"), 1, {}, "GPT2LMHeadModel's config has no num_key_value_heads"),
        (lambda: build_family("phi3"), 1, {}, "Phi3ForCausalLM has no separate k_proj and v_proj"),
    ],
)
def test_bad_input_is_named(build, heads, options, says, tokens):
    with pytest.raises(ValueError, match=says):
        convert_attention(build(), heads, calibration=tokens, **options)


def test_quantized_projections_are_refused(tokens, tmp_path):
    tiny.build_llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=RTNConfig(bits=4, group_size=32))
    with pytest.raises(ValueError, match="convert the model before it is quantized"):
        convert_attention(model, 1, calibration=tokens)
