"""Scores of all examples of a training dataset under the model in training, over all processes.

Shape legend: n examples, b of a batch.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_efficiency.selection.choosing import check_scores
from hf_efficiency.selection.signals import example_signal, scoring

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from transformers import TrainingArguments


def collated(
    dataset: Any, rows: Sequence[int], collate: Callable[[list[Any]], Mapping[str, Any]], device: torch.device
) -> dict[str, Any]:
    """A batch of the given rows, on the device.

    Raises:
        ValueError: the collator makes one long row of them, so that no example has a score of its own.
    """
    batch = collate([dataset[int(i)] for i in rows])
    width = batch["input_ids"].shape[0] if "input_ids" in batch else len(rows)
    if width != len(rows):
        raise ValueError(
            f"the data collator turns {len(rows)} examples into {width} rows, so none has a score of its own: switch "
            "padding_free and packing off, or give scores= made beforehand with select()."
        )
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def batches_of(
    dataset: Any,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    batch_size: int,
    device: torch.device,
    limit: int | None = None,
) -> Iterator[dict[str, Any]]:
    """The dataset's rows, evenly spaced where there is a limit, in batches."""
    rows = np.arange(len(dataset))
    if limit is not None and limit < len(rows):
        rows = rows[np.linspace(0, len(rows) - 1, limit).astype(int)]
    for start in range(0, len(rows), batch_size):
        yield collated(dataset, rows[start : start + batch_size].tolist(), collate, device)


def score_dataset(
    dataset: Any,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    scorer: Callable[[Mapping[str, Any]], torch.Tensor],
    model: Any,
    args: TrainingArguments,
    batch_size: int,
) -> NDArray[np.float32]:
    """A score of each example, (n,), the same in every process; each process scores its share.

    All processes run equally many batches, so that a sharded model finds its partners.

    Raises:
        ValueError: a score is NaN.
    """
    n, world = len(dataset), args.world_size
    scores = torch.zeros(n, dtype=torch.float64)
    with scoring(model):
        for start in range(0, -(-n // world), batch_size):
            share = np.arange(start, min(start + batch_size, -(-n // world))) * world + args.process_index
            mine = share[share < n]
            rows = mine if len(mine) else np.array([n - 1])
            values = scorer(collated(dataset, rows.tolist(), collate, args.device)).double().cpu()
            if len(mine):
                scores[mine] = values
    if world > 1 and torch.distributed.is_initialized():
        # minus infinity plus zero stays; NaN too, and is reported by every process
        on_device = scores.to(args.device)
        torch.distributed.all_reduce(on_device)
        scores = on_device.cpu()
    result = scores.float().numpy()
    check_scores(result, "the scores of the training dataset")
    return result


def mean_losses(
    datasets: Mapping[str, Any],
    collate: Callable[[list[Any]], Mapping[str, Any]],
    model: Any,
    args: TrainingArguments,
    batch_size: int,
) -> list[float]:
    """Mean loss of the examples of each dataset, in nats a token."""
    loss = partial(example_signal, model, name="loss")
    means = []
    for dataset in datasets.values():
        scores = score_dataset(dataset, collate, loss, model, args, batch_size)
        means.append(float(scores[np.isfinite(scores)].mean()))
    return means
