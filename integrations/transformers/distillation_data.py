"""Batches for distillation.

Shape legend: b batch, t tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_efficiency.distillation.sampling import IGNORED

# What a batch may hold for other purposes than the forward pass.
_NOT_FOR_THE_MODEL = ("labels", "prompts", "prompt_attention_mask", "num_items_in_batch")


class DistillCollator:
    """Pads rows of `input_ids`, and `labels` if they have any, on the right; without labels every token is one.

    Args:
        pad_token_id: Fills `input_ids` up; the attention mask leaves it out, so it may be any id.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Tensors `input_ids`, `attention_mask` and `labels` (b, t)."""
        if "input_ids" not in rows[0]:
            raise ValueError(
                f"The dataset's rows hold {', '.join(rows[0]) or 'nothing'}, but no input_ids: tokenize the text first."
            )
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for i, row in enumerate(rows):
            own = torch.as_tensor(row["input_ids"])
            given = row.get("attention_mask")
            ids[i, : len(own)] = own
            mask[i, : len(own)] = 1 if given is None else torch.as_tensor(given)
            labels[i, : len(own)] = torch.as_tensor(row.get("labels", row["input_ids"]))
        return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, IGNORED)}


def completed(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with an attention mask, and with labels where its collator made none.

    Raises:
        ValueError: It has no `input_ids`.
    """
    if "input_ids" not in batch:
        raise ValueError(f"A batch holds {', '.join(batch) or 'nothing'}, but no input_ids: tokenize the text first.")
    found = dict(batch)
    if found.get("attention_mask") is None:
        found["attention_mask"] = torch.ones_like(found["input_ids"])
    if found.get("labels") is None:
        found["labels"] = found["input_ids"].masked_fill(found["attention_mask"] == 0, IGNORED)
    return found


def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model takes."""
    return {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}


def valid_positions(batch: Mapping[str, Tensor]) -> Tensor:
    """Where (b, t - 1) the next token is a label, and neither it nor the present one is padding."""
    mask = batch["attention_mask"].bool()
    valid: Tensor = (batch["labels"][:, 1:] != IGNORED) & mask[:, 1:] & mask[:, :-1]
    return valid
