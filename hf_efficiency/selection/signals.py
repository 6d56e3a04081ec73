"""What one forward pass says about each example: loss, error norm, gradient norm, entropy.

Everything is a mean over the tokens that carry a label. Shape legend: b examples, t tokens, v vocabulary, d width,
m labelled tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

_CHUNK = 256  # tokens whose (chunk, v) probabilities are held in float32
IGNORE = -100


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode comes back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def to_batch(rows: Sequence[Sequence[int]], device: torch.device | str, pad: int = 0) -> dict[str, Tensor]:
    """Token ids padded on the right, (b, t), with mask and labels, for texts that are predicted from their start."""
    width = max(2, max(map(len, rows)))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row)
        mask[i, : len(row)] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORE)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def labelled(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Which positions predict a label, (b, t - 1) bool, and these labels, (b, t - 1).

    Raises:
        ValueError: the batch has neither labels nor token ids.
    """
    labels = batch.get("labels")
    if labels is None:
        if batch.get("input_ids") is None:
            raise ValueError(f"a batch has the entries {sorted(batch)}; input_ids or labels are needed to score it.")
        labels = batch["input_ids"]
        if batch.get("attention_mask") is not None:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORE)
    shifted = labels[:, 1:]
    return shifted != IGNORE, shifted


def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model takes: no labels, so that it computes no loss."""
    return {name: value for name, value in batch.items() if name not in ("labels", "num_items_in_batch")}


def token_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Logits of the positions that predict a label, (m, v)."""
    where, _ = labelled(batch)
    logits: Tensor = model(**inputs_of(batch)).logits
    return logits[:, -where.shape[1] - 1 : -1][where]


def per_example(values: Tensor, where: Tensor) -> Tensor:
    """Means of token values (m,) over each example, (b,); NaN-free: minus infinity for an example without labels."""
    counts = where.sum(1)
    rows = torch.repeat_interleave(torch.arange(len(where), device=values.device), counts.to(values.device))
    sums = torch.zeros(len(where), dtype=torch.float64, device=values.device).index_add_(0, rows, values.double())
    counts = counts.to(values.device)
    return torch.where(counts > 0, sums / counts.clamp(min=1), -torch.inf).float()


def signals(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Signals of each token, from logits (m, v) and labels (m,), in chunks.

    Returns:
        `loss`: −ln p(label) in nats. `el2n`: ‖p − y‖₂. `entropy`: of p in nats. `confidence`: the largest p. Each (m,).
    """
    parts: dict[str, list[Tensor]] = {"loss": [], "el2n": [], "entropy": [], "confidence": []}
    for chunk, target in zip(logits.split(_CHUNK), labels.split(_CHUNK), strict=True):
        log_p = F.log_softmax(chunk.float(), -1)
        p = log_p.exp()
        label = log_p.gather(1, target[:, None])[:, 0]
        squares = (p * p).sum(1) - 2 * label.exp() + 1
        parts["loss"].append(-label)
        parts["el2n"].append(squares.clamp(min=0).sqrt())
        parts["entropy"].append(-(p * log_p).sum(1))
        parts["confidence"].append(p.amax(1))
    return {name: torch.cat(tensors) if tensors else torch.empty(0) for name, tensors in parts.items()}


def example_signal(model: nn.Module, batch: Mapping[str, Any], name: str) -> Tensor:
    """One of `signals`, averaged over the tokens of each example, (b,)."""
    where, labels = labelled(batch)
    values = signals(token_logits(model, batch), labels[where])[name]
    return per_example(values, where)
