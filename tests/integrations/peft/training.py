"""A `Trainer` for adapters of the tiny Llama."""

import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from tests import tiny

STEPS = 10


def rows(count=32):
    tokens = torch.randint(3, 64, (count, 12), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in tokens.tolist()]


def adapted(config, seed=0, **base):
    """A tiny Llama with a new adapter."""
    torch.manual_seed(seed)
    return get_peft_model(tiny.build_llama(**base), config)


def trainer(model, folder, callbacks=(), **arguments):
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        **arguments,
    }
    return Trainer(
        model,
        TrainingArguments(folder, **settings),
        train_dataset=rows(),
        eval_dataset=rows(8),
        callbacks=list(callbacks),
    )


def losses(done):
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
