"""DyLoRA in a plain `Trainer`: usable at every rank, cut to one, the same with checkpointed activations."""

import pytest
import torch
from peft import PeftModel

from hf_efficiency import DyLoRAConfig
from tests import tiny
from tests.integrations.peft.conftest import logits
from tests.integrations.peft.training import adapted, losses, rows, state, trainer


def config(**arguments):
    return DyLoRAConfig(**{"r": 4, "task_type": "CAUSAL_LM", **arguments})


@torch.no_grad()
def loss(model):
    tokens = torch.tensor([row["input_ids"] for row in rows()])
    return model.eval()(input_ids=tokens, labels=tokens).loss.item()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The loss before training, and the model after it."""
    model = adapted(config())
    before = loss(model)
    trainer(model, tmp_path_factory.mktemp("trained"), max_steps=20).train()
    return before, model


@pytest.mark.parametrize("frozen", [False, True])
def test_every_rank_works_after_one_training(frozen, trained, tmp_path):
    before, model = trained
    if frozen:
        model = adapted(config(frozen=True, lora_alpha=4))
        trainer(model, tmp_path, max_steps=30).train()
    for k in (1, 2, 3, 4):
        model.set_rank(k)
        assert loss(model) < before - 0.3


def test_rank_is_saved_and_cut(trained, tmp_path):
    _, model = trained
    tokens = torch.tensor([rows(1)[0]["input_ids"]])
    model.set_rank(2)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path / "whole")
    loaded = PeftModel.from_pretrained(tiny.build_llama(), tmp_path / "whole")
    assert torch.equal(logits(loaded, tokens), expected)
    loaded.set_rank(4)
    assert not torch.allclose(logits(loaded, tokens), expected, atol=1e-3)
    loaded.truncate_rank(2)
    assert torch.equal(logits(loaded, tokens), expected)
    loaded.save_pretrained(tmp_path / "cut")
    whole, cut = ((tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("whole", "cut"))
    assert cut < 0.6 * whole
    again = PeftModel.from_pretrained(tiny.build_llama(), tmp_path / "cut", is_trainable=True)
    assert torch.equal(logits(again, tokens), expected)
    trainer(again, tmp_path, max_steps=2).train()


def test_layers_draw_one_rank_together(tmp_path):
    """Also when activations are computed again: the gradients are those without checkpointing."""

    def gradients(checkpointing):
        model = adapted(config())
        for name, p in model.named_parameters():
            if name.endswith(".b"):
                p.data.fill_(0.05)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(4)
        tokens = torch.tensor([row["input_ids"] for row in rows(4)])
        model(input_ids=tokens, labels=tokens).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, again = gradients(False), gradients(True)
    used = {tuple(grad.any(1).tolist()) for name, grad in plain.items() if name.endswith(".a")}
    assert len(used) == 1
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad)


def test_resumes_exactly(tmp_path):
    """The ranks come from torch's generator, which checkpoints hold."""
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        model = adapted(config())
        done = trainer(model, tmp_path, save_strategy="steps", save_steps=4)
        done.train(resume_from_checkpoint=resume)
        runs.append((state(model), losses(done)))
    for name, value in runs[0][0].items():
        assert torch.equal(runs[1][0][name], value)


def test_bad_ranks():
    model = adapted(config())
    with pytest.raises(ValueError, match="rank 5 must be between 1 and 4, the rank of 'default'"):
        model.set_rank(5)
    with pytest.raises(ValueError, match="rank 0 must be between 1 and 4"):
        model.truncate_rank(0)
    with pytest.raises(ValueError, match="there is no adapter 'x'; there are default"):
        model.set_rank(1, "x")
    model.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged at another rank: call unmerge_adapter"):
        model.set_rank(1)
