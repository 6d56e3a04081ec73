"""SoRA in a plain `Trainer`: gates become sparse, what is pruned leaves, resuming is exact."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from hf_efficiency import SoRACallback, SoRAConfig
from hf_efficiency.integrations.peft.pruning import trained_adapters
from hf_efficiency.integrations.peft.sora import SoRA, proximal_step
from tests import tiny
from tests.integrations.peft.conftest import logits
from tests.integrations.peft.training import adapted, losses, rows, state, trainer


def config(**arguments):
    return SoRAConfig(**{"r": 8, "sparse_lambda": 0.9, "task_type": "CAUSAL_LM", **arguments})


def gates(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(".e")}


def test_trains_prunes_and_saves_small(tmp_path):
    model = adapted(config())
    done = trainer(model, tmp_path, [SoRACallback()])
    assert all(len(gate) == 8 for gate in gates(model).values())
    done.train()
    assert losses(done)[-1] < losses(done)[0]
    left = {name: len(gate) for name, gate in gates(model).items()}
    assert 0 < sum(left.values()) < 8 * len(left)
    assert all(gate.all() for gate in gates(model).values())
    pattern = model.peft_config["default"].rank_pattern
    assert sorted(pattern.values()) == sorted(left.values())
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    numbers = sum(r * (1 + sum(_shape(name))) for name, r in pattern.items())
    assert sum(tensor.numel() for tensor in saved.values()) == numbers
    loaded = PeftModel.from_pretrained(tiny.build_llama(), tmp_path / "adapter")
    tokens = torch.tensor([rows(1)[0]["input_ids"]])
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def _shape(name):
    layer = tiny.build_llama().get_submodule(name)
    return layer.in_features, layer.out_features


def test_gates_follow_the_proximal_step(tmp_path):
    """With plain SGD a step is T(g - lr grad, lr lambda), by hand from the gradients of a second model."""
    torch.manual_seed(0)
    arguments = {"optim": "sgd", "max_steps": 1, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    plain, sparse = adapted(config(r=4)), adapted(config(r=4))
    for model in (plain, sparse):
        for name, p in model.named_parameters():
            if name.endswith(".b"):
                p.data.fill_(0.1)
    expected = {}
    trainer(plain, tmp_path, max_grad_norm=0, **arguments).train()
    for name, gate in gates(plain).items():
        expected[name] = gate.sign() * (gate.abs() - 0.1 * 0.9).clamp(min=0)
    callback = SoRACallback()
    callback.on_train_end = lambda *args, **kwargs: None
    trainer(sparse, tmp_path, [callback], max_grad_norm=0, **arguments).train()
    for name, gate in gates(sparse).items():
        torch.testing.assert_close(gate, expected[name])


def test_thresholds_follow_the_groups():
    model = adapted(config(target_modules=["q_proj"]))
    _, adapters = trained_adapters(model, SoRA)
    (first, second) = adapters.values()
    before = second.gates.detach().clone()
    first.gates.data.fill_(1.0)
    proximal_step(torch.optim.SGD([{"params": [first.gates], "lr": 0.5}]), adapters, 0.5)
    assert first.gates.tolist() == [0.75] * 8
    assert torch.equal(second.gates, before)


def test_resumes_exactly_and_trains_on(tmp_path):
    whole = adapted(config())
    trainer(whole, tmp_path / "a", [SoRACallback()], save_strategy="steps", save_steps=4).train()
    again = adapted(config())
    done = trainer(again, tmp_path / "a", [SoRACallback()], save_strategy="steps", save_steps=4)
    done.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    expected = state(whole)
    for name, value in state(again).items():
        assert torch.equal(value, expected[name])
    before = losses(done)[-1]
    done.args.max_steps = 15
    done.train()  # the optimizer's state was cut with the parameters
    assert losses(done)[-1] < before + 0.5


def test_training_without_the_callback_warns(tmp_path):
    with pytest.warns(UserWarning, match="nobody makes its gates sparse.*Add hf_efficiency.SoRACallback"):
        trainer(adapted(config()), tmp_path, max_steps=3).train()


def test_callback_on_another_model_is_refused(tmp_path):
    done = trainer(adapted(LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])), tmp_path, [SoRACallback()])
    with pytest.raises(ValueError, match="SoRACallback needs a model with a SoRAConfig adapter that is trained"):
        done.train()
