"""How fast a model reads a prompt and writes an answer."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from hf_efficiency.evaluation.metrics import GREEDY, evaluating

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Speed:
    """Tokens a second at batch size 1."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float


def measure_speed(model: PreTrainedModel, ids: Tensor, new_tokens: int = 32, repeats: int = 3) -> Speed:
    """Time greedy `model.generate` on the prompt `ids` (t,) or (1, t); medians of `repeats` runs after one to warm up.

    Prefill is the time to the first new token, over t; decode is the time that `new_tokens` further tokens take, each
    run's own prefill subtracted. An end-of-text token does not stop the run.

    Raises:
        ValueError: `new_tokens`, `repeats` or the prompt's length is below 1.
    """
    ids = ids.reshape(1, -1).to(model.device)
    for name, value in (("new_tokens", new_tokens), ("repeats", repeats), ("the prompt's length", ids.shape[1])):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    with evaluating(model):
        _generate_seconds(model, ids, 2)
        prefill, decode = [], []
        for _ in range(repeats):
            prefill.append(_generate_seconds(model, ids, 1))
            decode.append(_generate_seconds(model, ids, 1 + new_tokens) - prefill[-1])
    # a clock too coarse for a tiny model must not divide by zero
    tiny = time.get_clock_info("perf_counter").resolution
    return Speed(
        prefill_tokens_per_second=ids.shape[1] / max(statistics.median(prefill), tiny),
        decode_tokens_per_second=new_tokens / max(statistics.median(decode), tiny),
    )


def _generate_seconds(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> float:
    pad = model.generation_config.pad_token_id
    _wait(ids)
    start = time.perf_counter()
    cast("Any", model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0 if pad is None else pad,
        **GREEDY,
    )
    _wait(ids)
    return time.perf_counter() - start


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
