"""A run that was interrupted goes on where it stopped, and gives what it would have given."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_efficiency import AWQConfig, GPTQConfig, QuIPSharpConfig
from hf_efficiency.calibration import run_blockwise
from hf_efficiency.quantization.awq import AWQ
from hf_efficiency.quantization.gptq import GPTQ
from hf_efficiency.quantization.quip_sharp import QuIPSharp
from hf_efficiency.quantization.rtn import RTN
from tests.families import build_family

# Those that change more than the linear weights (AWQ folds scales into norms, fine-tuning moves norms) among them.
METHODS = {
    "gptq": lambda: GPTQ(group_size=16),
    "gptq-refined": lambda: GPTQ(group_size=16, refine_steps=2, refine_lr=0.01),
    "rtn-refined": lambda: RTN(group_size=16, refine_steps=2, refine_lr=0.01),
    "awq": lambda: AWQ(group_size=16),
    "quip": lambda: QuIPSharp(),
    "quip-tuned": lambda: QuIPSharp(fine_tune_steps=2),
}


@dataclass
class Interruption:
    """Interrupts a method at its n-th group, and counts the groups."""

    method: object
    at: int
    count: int = 0

    def __enter__(self):
        self.original = type(self.method).compress_group
        outer = self

        def compress_group(self, group):
            outer.count += 1
            if outer.count == outer.at:
                raise KeyboardInterrupt
            outer.original(self, group)

        # An attribute of the class, because the method's `repr` is part of the fingerprint.
        type(self.method).compress_group = compress_group
        return self

    def __exit__(self, *exception):
        type(self.method).compress_group = self.original


@pytest.fixture(scope="module")
def tokens():
    """(4, 16)."""
    return torch.randint(3, 256, (4, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["llama", "gpt2"])
def dense(request):
    return build_family(request.param)


def run(model, tokens, method, folder, **options):
    return run_blockwise(model, tokens, method, resume_dir=folder, progress=False, batch_size=2, **options)


def assert_same_models(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_uninterrupted(method, dense, tokens, tmp_path):
    whole, broken, resumed = (copy.deepcopy(dense) for _ in range(3))
    layers = run(whole, tokens, METHODS[method](), None)
    groups = 4  # of a block, in both families
    with Interruption(METHODS[method](), at=groups + 2) as first, pytest.raises(KeyboardInterrupt):
        run(broken, tokens, first.method, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["block-00000.safetensors", "run.json"]
    with Interruption(METHODS[method](), at=0) as second:
        again = run(resumed, tokens, second.method, tmp_path)
    assert second.count == groups
    assert again.keys() == layers.keys()
    assert_same_models(resumed, whole)
    with torch.no_grad():
        assert torch.equal(resumed(tokens).logits, whole(tokens).logits)


def test_a_finished_run_is_only_read(dense, tokens, tmp_path):
    first, second = copy.deepcopy(dense), copy.deepcopy(dense)
    run(first, tokens, GPTQ(group_size=16), tmp_path)
    with Interruption(GPTQ(group_size=16), at=1) as never:
        run(second, tokens, never.method, tmp_path)
    assert_same_models(first, second)


@pytest.mark.parametrize("change", ["method", "tokens", "weights", "model"])
def test_another_run_is_refused(change, tokens, tmp_path):
    run(build_family("llama"), tokens, GPTQ(group_size=16), tmp_path)
    model, method = build_family("llama"), GPTQ(group_size=16)
    if change == "method":
        method = GPTQ(group_size=16, bits=3)
    elif change == "tokens":
        tokens = tokens.flip(0)
    elif change == "weights":
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    else:
        model = build_family("qwen2")
    with pytest.raises(ValueError, match=r"holds blocks of another run .* Name an empty folder, or delete this one"):
        run(model, tokens, method, tmp_path)


def test_a_half_written_block_is_done_again(tokens, tmp_path):
    whole, resumed = build_family("llama"), build_family("llama")
    run(whole, tokens, GPTQ(group_size=16), tmp_path)
    last = tmp_path / "block-00001.safetensors"
    last.with_suffix(".partial").write_bytes(last.read_bytes()[:100])
    last.unlink()
    run(resumed, tokens, GPTQ(group_size=16), tmp_path)
    assert_same_models(resumed, whole)


@pytest.mark.parametrize("config", [GPTQConfig, AWQConfig, QuIPSharpConfig])
def test_through_from_pretrained(config, tokens, tmp_path):
    build_family("llama").save_pretrained(tmp_path / "dense")
    settings = {"calibration": tokens, "num_samples": 4, "seq_len": 16, "progress": False}
    settings |= {} if config is QuIPSharpConfig else {"group_size": 16}
    changed = {"damp_percent": 0.02} if config is not AWQConfig else {"n_grid": 10}

    def load(**more):
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=config(**{**settings, **more})
        )

    with Interruption(config(**settings), at=6), pytest.raises(KeyboardInterrupt):
        load(resume_dir=str(tmp_path / "blocks"))
    resumed = load(resume_dir=str(tmp_path / "blocks"))
    assert_same_models(resumed, load())
    resumed.save_pretrained(tmp_path / "quantized")
    assert "blocks" not in json.dumps(json.loads((tmp_path / "quantized" / "config.json").read_text()))
    with pytest.raises(ValueError, match="another run"):
        load(resume_dir=str(tmp_path / "blocks"), **changed)
    with pytest.raises(ValueError, match="another run"):
        load(resume_dir=str(tmp_path / "blocks"), seed=1)
