import itertools
import json

import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from hf_efficiency import SkipLayers, make_cache, speculative
from hf_efficiency.generation.speculative import Draft
from hf_efficiency.integrations.transformers.caches import attention
from hf_efficiency.integrations.transformers.speculative_drafters import shallow
from tests.families import build_family
from tests.tiny import build_llama


def _similar(model, noise=0.02):
    """A draft that agrees with the model now and then."""
    import copy

    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return draft


@pytest.fixture(scope="module")
def pair():
    target = build_llama()
    return target, _similar(target)


def _batch(pads, vocab=256, length=12):
    ids = torch.randint(3, vocab, (len(pads), length), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


DRAFTS = {
    "lookup": lambda draft: {"draft": "lookup"},
    "chain": lambda draft: {"draft": draft, "k": 4},
    "tree": lambda draft: {"draft": draft, "branching": (3, 2, 1)},
    "self": lambda draft: {"draft": "self", "k": 3},
    "skip": lambda draft: {"draft": SkipLayers(1), "k": 3},
}


@pytest.mark.parametrize("adapt", [False, True])
@pytest.mark.parametrize("pads", [(0,), (0, 4, 7)], ids=["one", "padded"])
@pytest.mark.parametrize("name", DRAFTS)
def test_greedy_text_is_the_plain_one(pair, name, pads, adapt):
    target, draft = pair
    inputs = _batch(pads)
    plain = target.generate(**inputs, max_new_tokens=30, do_sample=False)
    method = speculative(**DRAFTS[name](draft), adapt=adapt)
    assert torch.equal(target.generate(**inputs, max_new_tokens=30, do_sample=False, custom_generate=method), plain)
    if not adapt and name != "skip":
        assert method.statistics.tokens_per_forward > 1.1
    if name == "self" and not adapt:
        assert method.statistics.mean_acceptance == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gemma3", "gpt2", "qwen2", "mixtral", "opt", "bloom"])
def test_other_families_past_their_window(family, attention):
    target = build_family(family)
    target.set_attn_implementation(attention)
    inputs = _batch((0, 3), length=9)
    plain = target.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None)
    shapes = [{"k": 3}] if family == "bloom" else [{"k": 3}, {"branching": (2, 2)}]
    for shape in shapes:
        method = speculative(_similar(target), **shape, adapt=False)
        text = target.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None, custom_generate=method)
        assert torch.equal(text, plain)


def test_ends_where_plain_generation_ends(pair):
    target, draft = pair
    inputs = _batch((0, 2, 5))
    first = target.generate(**inputs, max_new_tokens=20, do_sample=False)
    ends = {"eos_token_id": [int(first[0, 17]), int(first[1, 20])], "pad_token_id": 0}
    plain = target.generate(**inputs, max_new_tokens=20, do_sample=False, **ends)
    for kwargs in ({"k": 5}, {"branching": (2, 2, 1)}):
        method = speculative("self" if "k" in kwargs else draft, adapt=False, **kwargs)
        text = target.generate(**inputs, max_new_tokens=20, do_sample=False, **ends, custom_generate=method)
        assert torch.equal(text, plain)


class _Forbid(LogitsProcessor):
    """Depends on the row's number and on all that was written."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row in range(len(scores)):
            scores[row, (int(input_ids[row].sum()) + row) % 7 :: 7] = -torch.inf
        return scores


class _Seven(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 7 == 0


def test_processors_and_criteria_see_what_they_see_in_plain_generation(pair):
    target, draft = pair
    inputs = _batch((0, 4))
    settings = {
        "max_new_tokens": 25,
        "do_sample": False,
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 3,
        "logits_processor": LogitsProcessorList([_Forbid()]),
        "stopping_criteria": StoppingCriteriaList([_Seven()]),
    }
    plain = target.generate(**inputs, **settings)
    for name in ("lookup", "chain", "tree"):
        method = speculative(**DRAFTS[name](draft), adapt=False)
        assert torch.equal(target.generate(**inputs, **settings, custom_generate=method), plain)


@pytest.mark.parametrize("name", ["lookup", "chain", "tree", "self"])
def test_sampled_text_has_the_targets_distribution(name):
    settings = {"vocab_size": 5, "eos_token_id": None, "initializer_range": 0.3}
    target = build_llama(**settings)
    draft = _similar(target, 0.15)
    warp = {"do_sample": True, "temperature": 0.8, "top_k": 4, "top_p": 0.95, "repetition_penalty": 1.3}
    prompt = torch.tensor([[1, 3, 4, 3]])
    expected = {}
    for first, second in itertools.product(range(5), repeat=2):
        probability = 1.0
        for text, token in (((), first), ((first,), second)):
            ids = torch.cat((prompt, torch.tensor([text], dtype=torch.long)), 1)
            out = target.generate(
                ids, max_new_tokens=1, **warp, output_scores=True, return_dict_in_generate=True, pad_token_id=0,
                attention_mask=torch.ones_like(ids),
            )  # fmt: skip
            probability *= float(out.scores[0][0].softmax(-1)[token])
        expected[first * 5 + second] = probability
    n = 2500
    shape = {"branching": (2, 2)} if name == "tree" else {"k": 2}
    method = speculative({"lookup": "lookup", "self": "self"}.get(name, draft), adapt=False, **shape)
    torch.manual_seed(0)
    mask = torch.ones_like(prompt)
    text = target.generate(
        prompt, attention_mask=mask, max_new_tokens=4, num_return_sequences=n, **warp, pad_token_id=0,
        custom_generate=method,
    )  # fmt: skip
    assert text.shape == (n, 8)
    # the first token is drawn after the prefill, and the draft's come after it
    counts = torch.bincount(text[:, 4] * 5 + text[:, 5], minlength=25).double()
    wanted = torch.tensor([expected[i] for i in range(25)], dtype=torch.float64)
    assert counts[wanted == 0].sum() == 0
    seen = wanted > 0
    assert chisquare(counts[seen].numpy(), (wanted[seen] / wanted[seen].sum() * n).numpy()).pvalue > 1e-3
    assert 0.1 < method.statistics.mean_acceptance <= 1


@pytest.fixture
def _references(monkeypatch):
    """The kernels' references, as on any CPU: Triton's interpreter takes a second a call."""
    monkeypatch.setenv("HF_EFFICIENCY_KERNELS", "reference")


CACHES = {
    "quantized": {"bits": 4, "group_size": 16, "window": 16},
    "h2o": {"budget": 24, "recent": 8},
    "streaming": {"sinks": 2, "window": 16},
    "paged": {},
}


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("shape", [{"k": 3}, {"branching": (2, 2)}], ids=["chain", "tree"])
@pytest.mark.parametrize("name", CACHES)
def test_our_caches(pair, name, shape):
    target, draft = build_llama(), pair[1]
    inputs = _batch((0,), length=30)

    def run(**kwargs):
        cache = make_cache(name, target, **CACHES[name])
        return target.generate(**inputs, max_new_tokens=24, do_sample=False, past_key_values=cache, **kwargs), cache

    plain, held = run()
    text, cache = run(custom_generate=speculative(draft, adapt=False, **shape))
    assert torch.equal(text, plain)
    assert cache.get_seq_length() == held.get_seq_length()


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("name", ["quantized", "h2o", "dynamic"])
def test_a_batch_on_a_given_cache_keeps_its_rows_together(name, pair):
    target, draft = build_llama(), pair[1]
    inputs = _batch((0, 5), length=30)

    def run(**kwargs):
        cache = DynamicCache(config=target.config) if name == "dynamic" else make_cache(name, target, **CACHES[name])
        text = target.generate(**inputs, max_new_tokens=16, do_sample=False, past_key_values=cache, **kwargs)
        return text, cache.get_seq_length()

    plain = run()
    text = run(custom_generate=speculative(draft, k=3, adapt=False))
    assert torch.equal(text[0], plain[0])
    assert text[1] == plain[1]
    with pytest.raises(ValueError, match="different branches of a tree"):
        run(custom_generate=speculative(draft, branching=(2, 2)))


class _Streamer(BaseStreamer):
    def __init__(self, stop=None):
        self.got, self.ended, self.stop = [], False, stop

    def put(self, value):
        self.got += value.flatten().tolist()
        if self.stop is not None and len(self.got) >= self.stop:
            raise KeyboardInterrupt

    def end(self):
        self.ended = True


def test_streams_and_goes_on_after_an_interrupt(pair):
    target, draft = pair
    inputs = _batch((0,))
    plain = target.generate(**inputs, max_new_tokens=20, do_sample=False)
    streamer = _Streamer()
    target.generate(
        **inputs, max_new_tokens=20, do_sample=False, custom_generate=speculative(draft, k=3, streamer=streamer)
    )
    assert streamer.got == plain[0].tolist()
    assert streamer.ended
    stopped, cache = _Streamer(stop=18), DynamicCache(config=target.config)
    method = speculative(draft, k=3, adapt=False, streamer=stopped)
    with pytest.raises(KeyboardInterrupt):
        target.generate(**inputs, max_new_tokens=20, do_sample=False, custom_generate=method, past_key_values=cache)
    assert method.statistics.tokens > 0
    # what came is the text's beginning; cache, draft and method serve on
    assert stopped.got == plain[0, : len(stopped.got)].tolist()
    assert cache.get_seq_length() < len(stopped.got)
    stopped.stop = None
    written = torch.tensor([stopped.got])
    more = {"max_new_tokens": 32 - len(stopped.got), "do_sample": False, "custom_generate": method}
    text = target.generate(written, attention_mask=torch.ones_like(written), past_key_values=cache, **more)
    assert torch.equal(text, plain)


def test_interrupted_inside_a_forward_the_cache_holds_the_text_so_far(pair):
    target, draft = build_llama(), pair[1]
    inputs = _batch((0,))
    plain = target.generate(**inputs, max_new_tokens=20, do_sample=False)
    cache, calls = DynamicCache(config=target.config), itertools.count()

    def interrupt(module, args):
        if next(calls) == 4:
            raise KeyboardInterrupt

    handle = target.model.layers[1].register_forward_pre_hook(interrupt)
    method = speculative(draft, k=3, adapt=False)
    with pytest.raises(KeyboardInterrupt):
        target.generate(**inputs, max_new_tokens=20, do_sample=False, custom_generate=method, past_key_values=cache)
    handle.remove()
    lengths = {layer.get_seq_length() for layer in cache.layers}
    assert lengths == {cache.get_seq_length()}
    begun = plain[:, : cache.get_seq_length() + 1]
    text = target.generate(
        begun, attention_mask=torch.ones_like(begun), past_key_values=cache, do_sample=False,
        max_new_tokens=32 - begun.shape[1], custom_generate=method,
    )  # fmt: skip
    assert torch.equal(text, plain)


@pytest.mark.parametrize("late", [False, True], ids=["before attention", "within attention"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h2o", {"budget": 10, "recent": 4}),
        ("tova", {"budget": 500}),
        ("snapkv", {"budget": 8, "window": 4}),
        ("streaming", {"sinks": 2, "window": 8}),
        ("rolling", {"window": 500}),
        ("quantized", {"bits": 2, "group_size": 16, "window": 4}),
    ],
)
def test_interrupted_around_attention_a_cache_that_attends_goes_on(name, options, late, pair, monkeypatch):
    target, inputs = build_llama(), _batch((0,))
    target.set_attn_implementation("eager")
    plain = target.generate(
        **inputs, max_new_tokens=32, do_sample=False, past_key_values=make_cache(name, target, **options)
    )
    cache, calls, attend = make_cache(name, target, **options), itertools.count(), attention._run

    def broken(*args):
        raise KeyboardInterrupt

    def interrupted(*args):
        if next(calls) != 7:
            return attend(*args)
        if not late:
            raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            patch.setattr(attention.Call, "__call__", broken)
            return attend(*args)

    method = speculative(pair[1], k=3, adapt=False)
    settings = {"do_sample": False, "custom_generate": method, "past_key_values": cache}
    monkeypatch.setattr(attention, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        target.generate(**inputs, max_new_tokens=32, **settings)
    assert {layer.get_seq_length() for layer in cache.layers} == {cache.get_seq_length()}
    begun = plain[:, : cache.get_seq_length() + 1]
    more = plain.shape[1] - begun.shape[1]
    text = target.generate(begun, attention_mask=torch.ones_like(begun), max_new_tokens=more, **settings)
    assert torch.equal(text, plain)


def test_outputs_statistics_and_log(pair, tmp_path):
    target, draft = pair
    inputs = _batch((0, 4))
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    settings = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.2, **wanted}
    plain = target.generate(**inputs, **settings)
    method = speculative(draft, k=3, adapt=False, log=tmp_path / "log.jsonl")
    out = target.generate(**inputs, **settings, custom_generate=method)
    assert torch.equal(out.sequences, plain.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(
            torch.stack(getattr(out, name)), torch.stack(getattr(plain, name)), atol=1e-4, rtol=0
        )
    statistics = out.statistics
    assert statistics is method.statistics
    assert statistics.tokens == 2 * 11
    assert 0 < statistics.mean_acceptance < 1
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["input_ids"] == out.sequences[0].tolist()
    assert lines[1]["input_ids"] == out.sequences[1, 4:].tolist()
    assert lines[0]["rejected"]
    assert all(12 < place < 24 for place in lines[0]["rejected"])


class _Own:
    """A user's drafter that knows the text."""

    def __init__(self, text, as_draft):
        self.text, self.as_draft = text, as_draft

    def begin(self, input_ids, attention_mask):
        self.asked = 0

    def propose(self, rows, branching, scorer):
        self.asked += 1
        chain = [self.text[len(rows[0]) : len(rows[0]) + len(branching)]]
        return Draft(torch.tensor(chain)) if self.as_draft else chain


@pytest.mark.parametrize("as_draft", [False, True])
def test_a_drafter_of_ones_own(pair, as_draft):
    target, inputs = pair[0], _batch((0,))
    plain = target.generate(**inputs, max_new_tokens=21, do_sample=False)
    own = _Own(plain[0].tolist(), as_draft)
    method = speculative(own, k=4, adapt=False)
    assert torch.equal(target.generate(**inputs, max_new_tokens=21, do_sample=False, custom_generate=method), plain)
    assert method.statistics.target_forwards == own.asked == 4  # 20 tokens after the prefill's one, 5 a forward


def test_a_draft_that_never_helps_is_given_up(pair):
    target, inputs = pair[0], _batch((0,))
    stranger = build_llama(seed=5)
    method = speculative(stranger, k=4)
    target.generate(**inputs, max_new_tokens=60, min_new_tokens=60, do_sample=False, custom_generate=method)
    assert method.statistics.plain_forwards > 0.8 * method.statistics.target_forwards


def test_bad_input(pair):
    target, draft = pair
    inputs = _batch((0,))

    def run(method, **kwargs):
        target.generate(**inputs, max_new_tokens=8, custom_generate=method, **kwargs)

    other = build_llama(vocab_size=300)
    with pytest.raises(ValueError, match="draft's vocabulary has 300 tokens and the target's 384"):
        run(speculative(other))
    with pytest.raises(ValueError, match="k is 0"):
        speculative(draft, k=0)
    with pytest.raises(ValueError, match="gives chains: leave branching out"):
        speculative("lookup", branching=(2, 2))
    with pytest.raises(TypeError, match="draft is a int"):
        speculative(3)
    with pytest.raises(ValueError, match="num_beams is 2"):
        run(speculative(draft), num_beams=2)
    with pytest.raises(ValueError, match="use_cache"):
        run(speculative(draft), use_cache=False)
    with pytest.raises(ValueError, match="output_attentions=True"):
        run(speculative(draft), output_attentions=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="StaticLayer"):
        run(speculative(draft), past_key_values=StaticCache(config=target.config, max_cache_len=40))
    with pytest.raises(ValueError, match="keep=\\[1\\]"):
        run(speculative(SkipLayers([1])))
    with pytest.raises(ValueError, match="token 999"):
        run(speculative(_Own([999] * 99, as_draft=False), adapt=False))
    with pytest.raises(ValueError, match="one text at a time"):
        target.generate(**_batch((0, 0)), max_new_tokens=4, custom_generate=speculative(streamer=_Streamer()))


def test_skipped_layers_share_weights(pair):
    target = build_llama(num_hidden_layers=4)
    view = shallow(target, [0, 3])
    assert view.model.layers[1] is target.model.layers[3]
    assert (len(view.model.layers), len(target.model.layers)) == (2, 4)
    assert (view.config.num_hidden_layers, target.config.num_hidden_layers) == (2, 4)
