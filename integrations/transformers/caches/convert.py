"""`convert_attention`: a model with fewer key-value heads, and what that costs.

Shape legend: n sequences, t tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficiency.calibration.data import resolve_calibration
from hf_efficiency.evaluation.metrics import evaluating
from hf_efficiency.generation.grouped_query import pool_heads
from transformers import AutoTokenizer, PreTrainedModel

_HELD_OUT = 8


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion cost, as mean cross-entropy (nats a token) on text that was not trained on.

    Attributes:
        heads_before: Key-value heads of a layer before.
        heads_after: And after.
        loss_before: Of the model as it was.
        loss_converted: After pooling.
        loss_after: After the training that followed; the same where there was none.
        steps: Of that training.
        cache_ratio: Bytes of the key-value cache after, as a share of those before.
    """

    heads_before: int
    heads_after: int
    loss_before: float
    loss_converted: float
    loss_after: float
    steps: int
    cache_ratio: float


def convert_attention(
    model: PreTrainedModel,
    num_key_value_heads: int,
    *,
    calibration: Any = "default",
    tokenizer: Any = None,
    steps: int = 0,
    learning_rate: float = 3e-4,
    batch_size: int = 4,
    seq_len: int = 256,
    seed: int = 0,
) -> ConversionReport:
    """Turns a model, in place, into one with fewer key-value heads: each is the mean of a group (Ainslie et al. 2023).

    The cache shrinks by the same factor. Pooling alone costs much; the paper trains on for 5 % of the original steps.
    With `steps`, a short recipe does the same here: AdamW over the attention's projections, cosine schedule to zero,
    next-token loss. The model can be saved and loaded as an ordinary checkpoint.

    Args:
        model: A decoder with separate key and value projections in floating point.
        num_key_value_heads: How many shall be left; a divisor of today's number.
        calibration: Text to measure and train on: a list of texts, a dataset, token ids, "default" (prose of Python's
            language reference) or "self".
        tokenizer: For texts; by default the one beside the model.
        steps: Of training; 0 for none.
        learning_rate: The highest.
        batch_size: Sequences of a step.
        seq_len: Tokens of a sequence.
        seed: Of the draw of sequences.

    Raises:
        ValueError: Numbers out of range, a model whose projections can't be pooled, or too little text.
    """
    modules = _attention_modules(model)
    config = model.config.get_text_config(decoder=True)
    before = int(config.num_key_value_heads)
    if num_key_value_heads < 1 or before % num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads is {num_key_value_heads}: choose a divisor of the model's {before} heads below it."
        )
    if steps < 0 or batch_size < 1 or learning_rate <= 0:
        raise ValueError(
            f"steps={steps}, batch_size={batch_size}, learning_rate={learning_rate}: give 0 or more steps, and "
            "positive numbers else."
        )
    if tokenizer is None and not isinstance(calibration, Tensor):
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    tokens = resolve_calibration(
        calibration, tokenizer, num_samples=_HELD_OUT + steps * batch_size, seq_len=seq_len, seed=seed, model=model
    )
    if len(tokens) < 2 and steps:
        raise ValueError(f"The text gives {len(tokens)} sequence of {seq_len} tokens: training needs some besides.")
    held = max(1, min(_HELD_OUT, len(tokens) // 2))
    measured, trained = tokens[:held], tokens[held:]
    start = _loss(model, measured)
    for module in modules:
        _pool(module, before, num_key_value_heads)
    config.num_key_value_heads = num_key_value_heads
    converted = _loss(model, measured)
    if steps:
        _uptrain(model, modules, trained, steps, learning_rate, batch_size)
    after = _loss(model, measured) if steps else converted
    ratio = num_key_value_heads / before
    return ConversionReport(before, num_key_value_heads, start, converted, after, steps, ratio)


def _attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules.

    Raises:
        ValueError: The model has none whose keys and values can be pooled.
    """
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if getattr(config, "num_key_value_heads", None) is None:
        raise ValueError(f"{name}'s config has no num_key_value_heads, so it can't be saved with fewer of them.")
    modules = [m for m in model.modules() if hasattr(m, "k_proj") and hasattr(m, "v_proj")]
    if not modules:
        raise ValueError(f"{name} has no separate k_proj and v_proj to pool.")
    for module in modules:
        for projection in (module.k_proj, module.v_proj):
            if type(projection) is not nn.Linear:
                raise ValueError(
                    f"A projection is a {type(projection).__name__}: convert the model before it is quantized or "
                    "gets adapters."
                )
    return modules


def _pool(module: Any, before: int, after: int) -> None:
    """Pools one attention module's keys and values."""
    for name in ("k_proj", "v_proj"):
        old = getattr(module, name)
        weight = pool_heads(old.weight.data, before, after)
        new = nn.Linear(old.in_features, weight.shape[0], bias=old.bias is not None, device="meta")
        new.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
        if old.bias is not None:
            new.bias = nn.Parameter(pool_heads(old.bias.data, before, after), requires_grad=old.bias.requires_grad)
        setattr(module, name, new)
    if hasattr(module, "num_key_value_groups"):
        module.num_key_value_groups *= before // after
    for name in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, after)


def _loss(model: PreTrainedModel, tokens: Tensor) -> float:
    """Mean cross-entropy of the tokens (n, t), one sequence at a time."""
    with evaluating(model):
        losses = [model(row[None].to(model.device), labels=row[None].to(model.device)).loss.item() for row in tokens]
    return sum(losses) / len(losses)


def _uptrain(
    model: PreTrainedModel, modules: list[nn.Module], tokens: Tensor, steps: int, rate: float, batch: int
) -> None:
    """Trains the attention's projections; all other parameters stay, and their `requires_grad` comes back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = [parameter for module in modules for parameter in module.parameters()]
    was_training = model.training
    try:
        model.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        model.train()
        optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            rows = tokens[torch.arange(step * batch, (step + 1) * batch) % len(tokens)].to(model.device)
            model(rows, labels=rows).loss.backward()
            nn.utils.clip_grad_norm_(chosen, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.train(was_training)
