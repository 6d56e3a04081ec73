"""Every cache in `generate`: rows, chunks, beams, drafts, saving, bytes, families. A new cache is a row."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from hf_efficiency.integrations.transformers.caches import CACHES, load_cache, make_cache
from hf_efficiency.integrations.transformers.caches.base import Layer
from tests import tiny
from tests.families import FAMILIES, build_family

# Name: arguments under which tokens leave, or are quantized, within a few tokens.
SMALL = {
    "streaming": {"sinks": 2, "window": 8},
    "rolling": {"window": 8},
    "h2o": {"budget": 12, "recent": 4},
    "h2o-fraction": {"budget": 0.4},
    "h2o-pyramid": {"budget": 12, "recent": 0, "schedule": "pyramid"},
    "tova": {"budget": 12},
    "snapkv": {"budget": 12, "window": 6},
    "priority": {"pinned": [(0, 3)], "budget": 12, "policy": "h2o"},
    "priority-newest": {"pinned": [(2, 5)], "budget": 12, "policy": "newest"},
    "random": {"budget": 12},
    "quantized": {"bits": 2, "group_size": 16, "window": 4},
    "quantized-fused": {"bits": 4, "group_size": 16, "window": 4, "fused": True},
    "paged": {"block_size": 4},
}
# Under these nothing leaves.
LARGE = {
    "streaming": {"window": 500},
    "rolling": {"window": 500},
    "h2o": {"budget": 500},
    "h2o-fraction": {"budget": 1.0},
    "tova": {"budget": 500},
    "snapkv": {"budget": 500},
    "random": {"budget": 500},
    "priority": {"pinned": [(0, 3)], "budget": 500},
    "quantized": {"window": 500},
    "paged": {},
}
# What a token sees does not depend on how a prompt was cut: no judgement at the end of a chunk.
CUT_AS_YOU_LIKE = ("streaming", "rolling", "paged")
GREEDY = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch):
    """The kernels' references, as on any CPU: Triton's interpreter takes a second a call."""
    monkeypatch.setenv("HF_EFFICIENCY_KERNELS", "reference")


def make(row, model, table=SMALL):
    return make_cache(row.split("-")[0], model, **table[row])


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    built = tiny.build_llama(head_dim=32)
    built.set_attn_implementation(request.param)
    return built


@pytest.fixture
def llama():
    return tiny.build_llama(head_dim=32)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 384, (2, 30), generator=torch.Generator().manual_seed(1))


def difference(one, other):
    return max(float((a - b).abs().max()) for a, b in zip(one.logits, other.logits, strict=True))


def feed(model, cache, ids, sizes, *, record=False):
    """Logits of all tokens, fed in pieces of these sizes."""
    if record:
        cache.activate_past_recording()
    out = []
    with torch.no_grad():
        for piece in ids.split(sizes, 1):
            out.append(model(piece, past_key_values=cache).logits)
            if record:
                cache.crop(0)
    return torch.cat(out, 1)


@pytest.mark.parametrize("row", LARGE)
def test_nothing_lost_is_the_full_cache(row, model, ids):
    """To the bit under eager attention, where it is transformers' own function that computes."""
    plain = model.generate(ids, max_new_tokens=12, **GREEDY)
    ours = model.generate(ids, max_new_tokens=12, past_key_values=make(row, model, LARGE), **GREEDY)
    assert torch.equal(plain.sequences, ours.sequences)
    exact = "eager" in model.config._attn_implementation and row not in ("snapkv", "tova", "streaming", "rolling")
    assert difference(plain, ours) <= (0 if exact else 1e-5)


@pytest.mark.parametrize("row", SMALL)
def test_each_padded_row_is_as_alone(row, model, ids):
    pads = 7
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    both = model.generate(ids, attention_mask=mask, max_new_tokens=14, past_key_values=make(row, model), **GREEDY)
    for i, pad in enumerate((0, pads)):
        alone = model.generate(ids[i : i + 1, pad:], max_new_tokens=14, past_key_values=make(row, model), **GREEDY)
        assert max(float((a[i] - b[0]).abs().max()) for a, b in zip(both.logits, alone.logits, strict=True)) < 1e-4


@pytest.mark.parametrize("row", SMALL)
def test_a_draft_sees_what_its_tokens_would_see_alone(row, model, ids):
    """A draft of 9, of which 4 are taken back and come again, is as one token after the other."""
    one = feed(model, make(row, model), ids, [14, *[1] * 16])
    cache = make(row, model)
    first = feed(model, cache, ids[:, :14], [14], record=True)
    with torch.no_grad():
        wrong = torch.cat((ids[:, 14:19], ids[:, :4]), 1)
        draft = model(wrong, past_key_values=cache).logits[:, :5]
        cache.crop(-4)
        assert cache.get_seq_length() == 19
        rest = feed(model, cache, ids[:, 19:], [7, 4], record=True)
    torch.testing.assert_close(torch.cat((first, draft, rest), 1), one, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("row", SMALL)
def test_a_path_of_a_tree_is_as_alone(row, model, ids):
    """Two branches in one forward, each as if it had come alone; the second is accepted, and the text goes on."""
    start, parents = 20, [-1, 0, 0, 1, 2, 4]  # paths 0 1 3 and 0 2 4 5
    tree = torch.randint(3, 384, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(6, start + 6, dtype=torch.bool)
    mask[:, :start] = True
    for i, parent in enumerate(parents):
        if parent >= 0:
            mask[i] |= mask[parent]
        mask[i, start + i] = True
    depths = mask[:, start:].sum(1) - 1
    cache = make(row, model)
    feed(model, cache, ids[:, :start], [14, *[1] * 6], record=True)
    form = mask.expand(2, 1, -1, -1)
    if "eager" in model.config._attn_implementation:
        form = torch.zeros(form.shape).masked_fill(~form, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = model(tree, attention_mask=form, position_ids=(start + depths)[None], past_key_values=cache).logits
    paths = {(0, 1, 3): None, (0, 2, 4, 5): None}
    for path in paths:
        text = torch.cat((ids[:, :start], tree[:, path], ids[:, start:26]), 1)
        paths[path] = feed(model, make(row, model), text, [14, *[1] * (text.shape[1] - 14)])[:, start:]
        torch.testing.assert_close(logits[:, path], paths[path][:, : len(path)], atol=2e-5, rtol=1e-4)
    cache.accept([0, 2, 4, 5], of=6)
    assert cache.get_seq_length() == start + 4
    rest = feed(model, cache, ids[:, start:26], [1] * 6, record=True)
    torch.testing.assert_close(rest, paths[0, 2, 4, 5][:, 4:], atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"The path \[2, 1\] must ascend within 0 to 5"):
        cache.accept([2, 1], of=6)


@pytest.mark.parametrize("row", SMALL)
def test_transformers_assisted_decoding(row, llama, ids):
    """The prompt has no n-gram twice, so that transformers' first step, of prompt and draft in one, has no draft."""
    llama.lm_head.weight.data[:] *= (torch.arange(384) % 24 == 0).float()[
        :, None
    ]  # few words, so that drafts are found
    outputs, drafts = [], []
    for extra in ({}, {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2}):
        options = {**GREEDY, **extra, "max_new_tokens": 40}
        lengths = []
        hook = llama.register_forward_pre_hook(
            lambda module, args, kwargs, seen=lengths: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        outputs.append(llama.generate(ids[:1], past_key_values=make(row, llama), **options).sequences)
        hook.remove()
        drafts.append(max(lengths[1:]))
    assert drafts[0] == 1 < drafts[1]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("row", SMALL)
def test_chunks_and_several_calls(row, llama, ids):
    """Two `generate` calls on one cache are one; `prefill_chunk_size` runs, and where it may not matter, does not."""
    cache = make(row, llama)
    first = llama.generate(ids, past_key_values=cache, max_new_tokens=6, **GREEDY)
    second = llama.generate(first.sequences, past_key_values=cache, max_new_tokens=6, **GREEDY)
    once = llama.generate(ids, past_key_values=make(row, llama), max_new_tokens=12, **GREEDY)
    assert torch.equal(second.sequences, once.sequences)
    cut = llama.generate(ids, past_key_values=make(row, llama), prefill_chunk_size=7, max_new_tokens=12, **GREEDY)
    assert cut.sequences.shape == once.sequences.shape
    if row in CUT_AS_YOU_LIKE:
        assert difference(cut, once) < 1e-5


@pytest.mark.parametrize("row", SMALL)
def test_beams(row, llama, ids):
    """Beams that go on take their caches along: reordered rows go on as they would alone."""
    cache, order = make(row, llama), torch.tensor([1, 1, 0])
    feed(llama, cache, ids[:, :20], [14, *[1] * 6])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([True, False, True, False]))
    cache.reorder_cache(order)
    after = feed(llama, cache, ids[order, 20:], [1] * 10)
    whole = feed(llama, make(row, llama), ids, [14, *[1] * 16])[order, 20:]
    torch.testing.assert_close(after, whole, atol=2e-5, rtol=1e-4)
    beams = llama.generate(ids, past_key_values=make(row, llama), num_beams=3, max_new_tokens=6, do_sample=False)
    assert beams.shape[0] == 2


@pytest.mark.parametrize("row", SMALL)
def test_saved_caches_go_on(row, llama, ids, tmp_path):
    cache = make(row, llama)
    feed(llama, cache, ids[:, :22], [16, *[1] * 6])
    cache.save(tmp_path / "cache.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]
    other = load_cache(tmp_path / "cache.safetensors", copy.deepcopy(llama))
    assert type(other) is type(cache)
    assert other.nbytes() == cache.nbytes()
    twin = copy.deepcopy(llama)
    restored = load_cache(tmp_path / "cache.safetensors", twin)
    assert torch.equal(feed(llama, cache, ids[:, 22:], [1] * 8), feed(twin, restored, ids[:, 22:], [1] * 8))


def formula(row, rows, prompt, new):
    """Bytes of one layer after a prompt and so many single tokens, from each class's documentation."""
    k, d, size = 2, 32, 4
    tokens = prompt + new
    per_slot = k * (2 * d * size + 8)
    if row in ("h2o", "tova", "priority", "priority-newest", "random"):
        return rows * (per_slot * (12 + (new > 0)) + 8)
    if row == "h2o-fraction":
        return rows * (per_slot * (-(-prompt * 2 // 5) + (new > 0)) + 8)
    if row == "snapkv":
        return rows * (per_slot * (12 + new) + 8)
    if row == "streaming":
        return rows * (k * size * d * (2 * 2 + 8 + 2 + 8) + 16 * (2 + 8) + 8)
    if row == "rolling":
        return rows * (k * size * d * (8 + 8) + 16 * 8 + 8)
    if row.startswith("quantized"):
        bits = SMALL[row]["bits"]
        old = (tokens - 4) // 16 * 16
        return rows * k * (old * (2 * d * bits // 8 + 4 * d // 16 + 4 * d // 16) + (tokens - old) * 2 * d * size)
    if row == "paged":
        return rows * -(-tokens // 4) * 4 * k * 2 * d * size
    raise KeyError(row)


@pytest.mark.parametrize("row", [row for row in SMALL if row != "h2o-pyramid"])
def test_measured_bytes_are_the_formula(row, llama, ids):
    cache = make(row, llama)
    feed(llama, cache, ids, [30])
    assert cache.nbytes() == 2 * formula(row, 2, 30, 0)
    feed(llama, cache, ids, [1] * 30)
    assert cache.nbytes() == 2 * formula(row, 2, 30, 30)
    full = DynamicCache(config=llama.config)
    feed(llama, full, torch.cat((ids, ids), 1), [60])
    dense = sum(x.untyped_storage().nbytes() for layer in full.layers for x in (layer.keys, layer.values))
    assert dense == 2 * 2 * 60 * 2 * 2 * 32 * 4
    assert cache.nbytes() < dense or row == "paged"


def test_pyramid_layers_keep_different_numbers(llama, ids):
    cache = make("h2o-pyramid", llama)
    feed(llama, cache, ids, [30])
    assert [layer.slots.size for layer in cache.layers] == [23, 1]


@pytest.mark.parametrize("row", SMALL)
def test_reset_forgets(row, llama, ids):
    cache = make(row, llama)
    first = feed(llama, cache, ids[:, :20], [16, 1, 1, 1, 1])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0
    assert torch.equal(first, feed(llama, cache, ids[:, :20], [16, 1, 1, 1, 1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    """Nothing leaves: as without our cache. Something leaves: the same rows as each alone."""
    model = build_family(family)
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 6, **GREEDY}
    plain = model.generate(ids, **options)
    for name in ("paged", "quantized"):
        if name == "quantized" and family not in ("gemma2", "gemma3", "qwen3"):
            with pytest.raises(ValueError, match="A head of size 8 can't be cut into groups"):
                model.generate(ids, past_key_values=make_cache(name, model), **options)
            continue
        ours = model.generate(ids, past_key_values=make_cache(name, model), **options)
        assert torch.equal(plain.sequences, ours.sequences)
        if name == "quantized":
            assert difference(plain, ours) < 1e-5
    if family in ("falcon", "bloom"):
        with pytest.raises(ValueError, match="does not use transformers' attention interface"):
            make_cache("h2o", model)
        return
    for row in ("h2o", "snapkv", "rolling"):
        ours = model.generate(ids, past_key_values=make(row, model, LARGE), **options)
        assert torch.equal(plain.sequences, ours.sequences)
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
        both = model.generate(ids, attention_mask=mask, past_key_values=make(row, model), **options)
        for i, pad in enumerate((0, 5)):
            alone = model.generate(ids[i : i + 1, pad:], past_key_values=make(row, model), **options)
            assert max(float((a[i] - b[0]).abs().max()) for a, b in zip(both.logits, alone.logits, strict=True)) < 1e-4


@pytest.mark.parametrize("family", ["falcon", "bloom"])
def test_quantized_where_attention_is_the_models_own(family):
    """These attend without transformers' interface; what is due is quantized at the next step."""
    model = build_family(family, hidden_size=64)
    ids = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    plain = model.generate(ids, max_new_tokens=6, **GREEDY)
    cache = make_cache("quantized", model, bits=8, group_size=16, window=8)
    ours = model.generate(ids, past_key_values=cache, max_new_tokens=6, **GREEDY)
    assert cache.layers[0].store.groups == [2]
    assert 0 < difference(plain, ours) < 0.2


def test_counting_bytes_leaves_a_draft_open(llama, ids):
    for row in SMALL:
        cache = make(row, llama)
        feed(llama, cache, ids[:, :20], [20], record=True)
        with torch.no_grad():
            llama(ids[:, 20:24], past_key_values=cache)
        assert cache.nbytes() > 0
        cache.crop(-4)
        assert cache.get_seq_length() == 20


def test_layers_that_slide_keep_their_own_cache():
    model = build_family("gemma3")
    cache = make("h2o", model)
    assert [type(layer) is DynamicSlidingWindowLayer for layer in cache.layers] == [True, False]
    assert isinstance(cache.layers[1], Layer)


def test_uneven_layers():
    """A layer with fewer key-value heads than the others."""
    from torch import nn

    model = tiny.build_llama(head_dim=32)
    attention = model.model.layers[1].self_attn
    for name in ("k_proj", "v_proj"):
        setattr(attention, name, nn.Linear(64, 32, bias=False))
    attention.num_key_value_groups = 4
    ids = torch.randint(3, 384, (1, 20), generator=torch.Generator().manual_seed(0))
    plain = model.generate(ids, max_new_tokens=5, **GREEDY)
    for row in LARGE:
        cache = make(row, model, LARGE)
        cache.layers[1].expected = None
        ours = model.generate(ids, past_key_values=cache, max_new_tokens=5, **GREEDY)
        assert torch.equal(plain.sequences, ours.sequences)


def test_other_caches_and_none_compute_as_before(llama, ids):
    before = llama(ids).logits
    make("h2o", llama)
    assert llama.config._attn_implementation == "hf_efficiency_sdpa"
    assert torch.equal(before, llama(ids).logits)
    a = llama.generate(ids, past_key_values=DynamicCache(config=llama.config), max_new_tokens=5, **GREEDY)
    llama.set_attn_implementation("sdpa")
    assert difference(a, llama.generate(ids, max_new_tokens=5, **GREEDY)) == 0


@pytest.mark.parametrize("row", ["h2o", "quantized-fused"])
def test_the_kernels_give_the_same(row, monkeypatch, ids):
    """One layer, so that few calls go through Triton's interpreter."""
    model = tiny.build_llama(head_dim=32, num_hidden_layers=1)
    expected = feed(model, make(row, model), ids[:1], [28, 1, 1])
    monkeypatch.delenv("HF_EFFICIENCY_KERNELS")
    torch.testing.assert_close(feed(model, make(row, model), ids[:1], [28, 1, 1]), expected, atol=1e-4, rtol=1e-4)


def test_stream_of_20000_tokens_in_flat_memory():
    """In a model of one layer, what a query sees decides: sinks and window alone, at positions within the cache.

    So the last logits after 20,000 tokens are those of a plain forward over the sinks and the newest tokens.
    """
    model = tiny.build_llama(head_dim=32, num_hidden_layers=1)
    text = torch.randint(3, 384, (2, 20_000), generator=torch.Generator().manual_seed(0))
    cache, bytes_seen = make_cache("streaming", model, sinks=4, window=28), set()
    with torch.no_grad():
        for piece in text[:, :-20].split(500, 1):
            model(piece, past_key_values=cache)
            bytes_seen.add(cache.nbytes())
        last = feed(model, cache, text[:, -20:], [1] * 20)[:, -1]
        bytes_seen.add(cache.nbytes())
        expected = model(torch.cat((text[:, :4], text[:, -28:]), 1)).logits[:, -1]
    assert len(bytes_seen) == 1
    torch.testing.assert_close(last, expected, atol=2e-3, rtol=2e-3)
    kept = make_cache("streaming", model, sinks=4, window=28, positions="absolute")
    assert float((feed(model, kept, text[:, :5000], [500] * 10)[:, -1] - expected).abs().max()) > 0.01


def test_a_prompt_is_computed_once_for_many(llama, ids):
    """Forks share the prompt's blocks; each writes into its own."""
    prompt = make_cache("paged", llama, block_size=4)
    feed(llama, prompt, ids[:1, :10], [10])
    alone, rows = prompt.fork(), prompt.fork()
    rows.batch_repeat_interleave(3)
    used, unshared = prompt.blocks()
    assert (used, unshared) == (2 * 3, 2 * 3 * 5)
    first = feed(llama, alone, ids[:1, 10:], [1] * 20)
    third = feed(llama, rows, ids[:1, 10:].expand(3, -1), [1] * 20)
    whole = feed(llama, make_cache("paged", llama, block_size=4), ids[:1], [10, *[1] * 20])[:, 10:]
    torch.testing.assert_close(first, whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(third[2:], whole, atol=1e-5, rtol=1e-4)
    assert prompt.get_seq_length() == 10


def test_every_cache_is_in_the_table():
    assert {row.split("-")[0] for row in SMALL} == set(CACHES)
