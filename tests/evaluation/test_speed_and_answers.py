import pytest
import torch

from hf_efficiency.evaluation import answer, measure_speed
from hf_efficiency.evaluation import speed as speed_module


class Clock:
    """A prompt takes 2 s and each token after the first 0.5 s, but for one run that is disturbed."""

    def __init__(self):
        self.now = 0.0
        self.runs = []

    def perf_counter(self):
        return self.now

    def generate(self, ids, *, max_new_tokens, min_new_tokens, **kwargs):
        assert max_new_tokens == min_new_tokens
        assert kwargs["do_sample"] is False
        self.runs.append(max_new_tokens)
        self.now += 2 + 0.5 * (max_new_tokens - 1) + (100 if len(self.runs) == 3 else 0)


def test_medians_with_prefill_subtracted(tiny_llama, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed_module.time, "perf_counter", clock.perf_counter)
    monkeypatch.setattr(tiny_llama, "generate", clock.generate)
    speed = measure_speed(tiny_llama, torch.arange(10), new_tokens=8, repeats=3)
    assert clock.runs == [2] + 3 * [1, 9]
    assert speed.prefill_tokens_per_second == 5  # 10 tokens in 2 s
    assert speed.decode_tokens_per_second == 2  # 8 tokens in 4 s


def test_real_generate_takes_every_token(tiny_llama):
    tiny_llama.generation_config.eos_token_id = list(range(384))  # would stop at once
    speed = measure_speed(tiny_llama, torch.arange(10), new_tokens=3, repeats=1)
    assert speed.prefill_tokens_per_second > 0
    assert speed.decode_tokens_per_second > 0


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        (torch.arange(0), {}, "prompt's length is 0"),
        (torch.arange(3), {"new_tokens": 0}, "new_tokens is 0"),
        (torch.arange(3), {"repeats": 0}, "repeats is 0"),
    ],
)
def test_speed_of_nothing(tiny_llama, ids, settings, message):
    with pytest.raises(ValueError, match=message):
        measure_speed(tiny_llama, ids, **settings)


def test_answer_is_greedy_and_leaves_the_prompt_out(tiny_llama, tiny_tokenizer):
    tiny_llama.generation_config.update(do_sample=True, temperature=5.0, top_k=5)
    first = answer(tiny_llama, tiny_tokenizer, "Once upon a time", max_new_tokens=8)
    assert first == answer(tiny_llama, tiny_tokenizer, "Once upon a time", max_new_tokens=8)
    ids = tiny_tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    for _ in range(8):
        best = tiny_llama(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], 1)
    assert first == tiny_tokenizer.decode(ids[0, -8:], skip_special_tokens=True).strip()


def test_answer_uses_the_chat_template(tiny_llama, tiny_tokenizer, monkeypatch):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    seen = []
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template, raising=False)
    monkeypatch.setattr(tiny_llama, "generate", lambda ids, **kwargs: seen.append(ids) or ids)
    assert answer(tiny_llama, tiny_tokenizer, "Hi") == ""
    assert tiny_tokenizer.decode(seen[0][0]) == "[user]Hi>"


def test_empty_prompt(tiny_llama, tiny_tokenizer):
    with pytest.raises(ValueError, match="prompt is empty"):
        answer(tiny_llama, tiny_tokenizer, " ")
