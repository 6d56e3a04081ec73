"""What caches refuse, and how they say so."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_efficiency import RTNConfig
from hf_efficiency.integrations.transformers.caches import load_cache, make_cache
from tests import tiny
from tests.families import build_family


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch):
    monkeypatch.setenv("HF_EFFICIENCY_KERNELS", "reference")


@pytest.fixture
def llama():
    return tiny.build_llama()


@pytest.fixture
def ids():
    return torch.randint(3, 384, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        ("h20", {}, ValueError, "There is no cache 'h20': choose one of streaming, rolling, h2o"),
        ("h2o", {"budget": 0}, ValueError, "budget is 0 tokens: at least 1 is needed"),
        ("h2o", {"budget": 1.2}, ValueError, "budget is 1.2: a fraction of the prompt"),
        ("h2o", {"budget": "8"}, TypeError, "budget is '8': give tokens as an int"),
        ("h2o", {"budget": 8, "recent": 8}, ValueError, "a budget of 8 tokens, and the tokens that must stay .* are 9"),
        ("h2o", {"recent": -1}, ValueError, "recent is -1 tokens"),
        ("h2o", {"budget": 8, "schedule": [8, 8, 8]}, ValueError, "schedule has 3 budgets, and 2 layers need one each"),
        ("snapkv", {"budget": 20}, ValueError, "a budget of 20 tokens, and the tokens that must stay .* are 33"),
        ("priority", {"pinned": [(0, 9)], "budget": 9}, ValueError, "budget of 9 tokens, .* are 10: raise the budget"),
        ("priority", {"pinned": [(4, 2)]}, ValueError, r"pinned span \(4, 2\) is empty or negative"),
        ("priority", {"pinned": [], "policy": "lru"}, ValueError, "policy is 'lru': choose one of h2o, tova"),
        ("streaming", {"sinks": -1}, ValueError, "sinks is -1: give a number of tokens, 0 or more"),
        ("streaming", {"window": 0}, ValueError, "window is 0: give a number of tokens, at least 1"),
        ("streaming", {"positions": "kept"}, ValueError, "positions is 'kept': choose 'cache' or 'absolute'"),
        ("rolling", {"window": 2.5}, ValueError, "window is 2.5"),
        ("quantized", {"bits": 3}, ValueError, "bits is 3: choose 2, 4 or 8"),
        ("quantized", {"group_size": 24}, ValueError, "group_size is 24: choose 16, 32"),
        ("quantized", {"window": -1}, ValueError, "window is -1"),
        ("paged", {"block_size": 0}, ValueError, "block_size is 0"),
        ("paged", {"blocks": 3}, TypeError, "blocks"),
    ],
)
def test_options_out_of_range(name, options, error, says, llama):
    with pytest.raises(error, match=says):
        make_cache(name, llama, **options)


def test_no_model():
    with pytest.raises(TypeError, match="H2OCache needs the model it is for, and got int"):
        make_cache("h2o", 12)


def test_head_sizes_that_bits_can_not_hold():
    with pytest.raises(ValueError, match="A head of size 8 can't be cut into groups of 16 or more channels"):
        make_cache("quantized", build_family("llama"))


def test_positions_within_the_cache_need_a_rotary_embedding():
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no rotary embedding.*use positions='absolute'"):
        make_cache("streaming", build_family("gpt2"))
    make_cache("streaming", build_family("gpt2"), positions="absolute")


def test_attention_without_weights():
    model = tiny.build_llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="attends with 'flash_attention_2'; caches that evict need 'sdpa' or 'eager'"):
        make_cache("h2o", model)


@pytest.mark.parametrize("name", ["h2o", "rolling", "quantized", "paged"])
def test_another_model(name, llama, ids):
    cache = make_cache(name, llama)
    with pytest.raises(ValueError, match="a model with 2 key-value heads of size 16; this one has 4 of size 16"):
        tiny.build_llama(num_key_value_heads=4).generate(ids, past_key_values=cache, max_new_tokens=2)
    deep = tiny.build_llama(num_hidden_layers=3)
    make_cache(name, deep)
    with pytest.raises(ValueError, match=r"another model|2 layers, and this one has a layer 2"):
        deep.generate(ids, past_key_values=make_cache(name, llama), max_new_tokens=2)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["h2o", "rolling"])
def test_attention_that_does_not_go_through_the_cache(name, beams, llama, ids):
    cache = make_cache(name, llama)
    llama.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="The model's attention did not go through the cache"):
        llama.generate(ids, past_key_values=cache, max_new_tokens=3, num_beams=beams)


@pytest.mark.parametrize("name", ["h2o", "rolling", "quantized", "paged"])
def test_another_batch_and_gradients(name, llama, ids):
    cache = make_cache(name, llama)
    with pytest.raises(ValueError, match=r"run the model under torch.no_grad\(\)"):
        llama(ids, past_key_values=cache)
    with torch.no_grad():
        cache.reset()
        llama(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="The cache holds 2 rows, and 1 came"):
            llama(ids[:1], past_key_values=cache)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("h2o", {"budget": 8}, "5 tokens can't be taken back: others left the cache"),
        ("rolling", {"window": 8}, "5 tokens can't be taken back: they are in the ring buffer"),
        ("quantized", {"window": 0, "group_size": 16}, "5 tokens can't be taken back: all but the newest 4 are"),
    ],
)
def test_crop_of_what_left(name, options, says, llama, ids):
    cache = make_cache(name, llama, **options)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
    with pytest.raises(RuntimeError, match=says):
        cache.crop(-5)
    with pytest.raises(ValueError, match="give the tokens to remove as a negative number"):
        cache.crop(5)


@pytest.mark.parametrize("name", ["h2o", "rolling"])
def test_masks_cover_all_tokens(name, llama, ids):
    cache = make_cache(name, llama, **({"budget": 8} if name == "h2o" else {"window": 8}))
    with torch.no_grad():
        llama(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="mask covers 9 tokens, and the cache has seen 21"):
            llama(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 1, 1, 9, dtype=torch.bool))


def test_files_that_are_no_cache(llama, ids, tmp_path):
    path = tmp_path / "cache.safetensors"
    with pytest.raises(ValueError, match="There is no file"):
        load_cache(path, llama)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no safetensors file"):
        load_cache(path, llama)
    llama.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not of a cache that hf_efficiency saved"):
        load_cache(tmp_path / "model.safetensors", llama)
    cache = make_cache("h2o", llama)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
    cache.save(path)
    with pytest.raises(ValueError, match="holds the cache of another model"):
        load_cache(path, tiny.build_llama(num_hidden_layers=3))


@pytest.mark.parametrize("name", ["h2o", "streaming", "quantized", "paged"])
def test_an_interrupt_leaves_a_cache_that_resets(name, llama, ids):
    """A forward that breaks off between two layers: the state says so or goes on, and `reset` makes it as new."""
    cache = make_cache(name, llama)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = llama.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        llama(ids, past_key_values=cache)
    hook.remove()
    cache.reset()
    options = {"max_new_tokens": 4, "do_sample": False}
    again = llama.generate(ids, past_key_values=cache, **options)
    assert torch.equal(again, llama.generate(ids, past_key_values=make_cache(name, llama), **options))


@pytest.mark.parametrize("name", ["h2o", "streaming", "quantized", "paged"])
def test_a_quantized_model_generates_with_every_cache(name, ids, tmp_path):
    tiny.build_llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=RTNConfig(bits=4, group_size=32))
    plain = model.generate(ids, max_new_tokens=5, do_sample=False)
    ours = model.generate(ids, past_key_values=make_cache(name, model), max_new_tokens=5, do_sample=False)
    assert name == "h2o" or torch.equal(plain, ours)
