"""The budget of PEFT's AdaLoRA and of AdaDoRA, in a plain `Trainer`."""

import math

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from safetensors.torch import load_file

from hf_efficiency import AdaDoRAConfig, AdaLoRACallback
from tests import tiny
from tests.integrations.peft.conftest import logits
from tests.integrations.peft.training import STEPS, adapted, losses, rows, state, trainer

MATRICES = 14
BUDGET = {"init_r": 6, "target_r": 4, "tinit": 2, "tfinal": 2, "target_modules": "all-linear"}
KINDS = {
    "adalora": lambda **arguments: AdaLoraConfig(
        **{"total_step": 999, "task_type": "CAUSAL_LM", **BUDGET, **arguments}
    ),
    "adadora": lambda **arguments: AdaDoRAConfig(**{"task_type": "CAUSAL_LM", **BUDGET, **arguments}),
}
KIND = pytest.mark.parametrize("kind", KINDS)
PEFT_PATTERN = pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")


def alive(model):
    """Directions that are not zero, of each matrix."""
    return [int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name or name.endswith(".e")]


@PEFT_PATTERN
@KIND
@pytest.mark.parametrize("importance", ["sensitivity", "gradient_norm", "magnitude"])
def test_ends_at_the_budget_and_saves_small(kind, importance, tmp_path):
    model = adapted(KINDS[kind]())
    trainer(model, tmp_path, [AdaLoRACallback(importance)]).train()
    left = alive(model)
    assert len(left) == MATRICES
    assert sum(left) == 4 * MATRICES
    assert len(set(left)) > 1  # the budget went where it matters
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    directions = [t.shape[0] for name, t in saved.items() if name.endswith(("lora_A", "_adapter.a"))]
    assert sum(directions) == 4 * MATRICES
    loaded = PeftModel.from_pretrained(tiny.build_llama(), tmp_path / "adapter")
    tokens = torch.tensor([rows(1)[0]["input_ids"]])
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), atol=1e-5, rtol=1e-5)


@KIND
@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_are_those_of_the_optimizer(kind, accumulation, tmp_path):
    """Directions left after each step, by equation 12 with 84 at the beginning, 56 at the end and 6 steps between."""
    seen = []

    class Count(AdaLoRACallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            super().on_optimizer_step(args, state, control, **kwargs)
            seen.append(sum(alive(kwargs["model"])))

    trainer(adapted(KINDS[kind]()), tmp_path, [Count()], gradient_accumulation_steps=accumulation).train()
    between = [int(56 + 28 * (1 - i / 6) ** 3) for i in range(1, 6)]
    assert seen == [84, 84, *between, 56, 56, 56]


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_orthogonality_is_trained_and_not_in_the_losses(task_type, tmp_path):
    """PEFT alone has the term only with a task type, and then in the evaluation loss as well."""

    def gap(model):
        norms = []
        for module in model.modules():
            if isinstance(module, AdaLoraLayer):
                a, b = module.lora_A["default"], module.lora_B["default"]
                norms += [(a @ a.T - torch.eye(6)).norm(), (b.T @ b - torch.eye(6)).norm()]
        return torch.stack(norms).mean().item()

    model = adapted(KINDS["adalora"](task_type=task_type))
    before = gap(model)
    done = trainer(model, tmp_path, [AdaLoRACallback(orth_reg_weight=5.0)], max_steps=20)
    done.train()
    after = gap(model)
    assert after < 0.7 * before
    tokens = torch.tensor([row["input_ids"] for row in rows(8)])
    with torch.no_grad():
        plain = model.get_base_model()(input_ids=tokens, labels=tokens).loss.item()
    assert done.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-4)
    assert losses(done)[0] == pytest.approx(math.log(384), abs=1.0)
    unweighted = adapted(KINDS["adalora"](task_type=task_type, orth_reg_weight=0.0))
    trainer(unweighted, tmp_path, [AdaLoRACallback()], max_steps=20).train()
    assert gap(unweighted) > 1.2 * after


@PEFT_PATTERN
@KIND
def test_resumes_exactly(kind, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 5}
    whole = adapted(KINDS[kind]())
    trainer(whole, tmp_path, [AdaLoRACallback()], **arguments).train()
    again = adapted(KINDS[kind]())
    done = trainer(again, tmp_path, [AdaLoRACallback()], **arguments)
    done.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    expected = state(whole)
    for name, value in state(again).items():
        assert torch.equal(value, expected[name])
    assert again.peft_config["default"].rank_pattern == whole.peft_config["default"].rank_pattern


@KIND
def test_early_stop_ends_at_the_budget_too(kind, tmp_path):
    class Stop(AdaLoRACallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    model = adapted(KINDS[kind]())
    trainer(model, tmp_path, [Stop()]).train()
    assert sum(alive(model)) == 4 * MATRICES


@PEFT_PATTERN
def test_best_checkpoint_at_the_end(tmp_path):
    """What is loaded back, whole, before training ends, is brought to the budget as well."""
    model = adapted(KINDS["adadora"]())
    done = trainer(
        model, tmp_path, [AdaLoRACallback()], save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True,
    )  # fmt: skip
    done.train()
    assert sum(alive(model)) == 4 * MATRICES


@KIND
def test_training_without_the_callback_warns_once(kind, tmp_path):
    with pytest.warns(UserWarning, match="nobody allocates its budget.*Add hf_efficiency.AdaLoRACallback") as warned:
        trainer(adapted(KINDS[kind]()), tmp_path, max_steps=4).train()
    assert sum("nobody allocates" in str(w.message) for w in warned) == 1


@pytest.mark.filterwarnings("error:.*nobody allocates")
@KIND
def test_nothing_to_warn_of(kind, tmp_path):
    """With the callback; in evaluation; in a loop that calls PEFT's own method."""
    trainer(adapted(KINDS[kind]()), tmp_path, [AdaLoRACallback()], max_steps=5).train()
    model = adapted(KINDS["adalora"](total_step=9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.tensor([row["input_ids"] for row in rows(4)])
    for step in range(4):
        model.eval()(input_ids=tokens)
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="importance='size' must be one of sensitivity, gradient_norm, magnitude"):
        AdaLoRACallback("size")
    lora = adapted(LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="AdaLoraConfig or AdaDoRAConfig adapter that is trained; this one has LoraC"):
        trainer(lora, tmp_path, [AdaLoRACallback()]).train()
    model = adapted(KINDS["adalora"](tinit=8))
    with pytest.raises(ValueError, match=f"tinit=8 and tfinal=2 leave none of {STEPS} training steps"):
        trainer(model, tmp_path, [AdaLoRACallback()]).train()
    assert model.peft_config["default"].total_step == 999
