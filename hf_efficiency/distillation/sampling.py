"""Sequences that a model writes: the student's own (GKD), the teacher's (sequence-level distillation), and whole data.

Shape legend: b batch, p prompt tokens, t tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # label of a token that has no loss


def prompts_of(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, prompt_length: int) -> list[Tensor]:
    """The prompt of each row: the tokens before the first label, or the first `prompt_length` where all have labels.

    Args:
        input_ids: (b, t).
        attention_mask: (b, t).
        labels: (b, t), -100 where there is none.
        prompt_length: At least 1.
    """
    prompts = []
    for ids, mask, row in zip(input_ids, attention_mask.bool(), labels, strict=True):
        kept, kept_labels = ids[mask], row[mask]
        labelled = (kept_labels != IGNORED).nonzero()
        first = int(labelled[0]) if len(labelled) else len(kept)
        prompts.append(kept[: first or prompt_length])
    return prompts


@torch.no_grad()
def continue_prompts(
    model: Any,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    pad_token_id: int = 0,
) -> dict[str, Tensor]:
    """Lets the model go on from each prompt, all at once and with a cache, until its end-of-sequence token.

    Args:
        model: A causal language model with `generate`.
        prompts: Token ids (p,), of any lengths of at least 1.
        max_new_tokens: At most so many more.
        temperature: Of the sampling from the full distribution; 0: the most likely token.
        seed: Of the draw, which leaves the global generators alone.
        pad_token_id: Fills rows up.

    Returns:
        `input_ids`, `attention_mask` and `labels` (b, t), padded on the right; prompts have no labels.

    Raises:
        ValueError: A prompt is empty.
    """
    if not prompts or min(len(p) for p in prompts) < 1:
        raise ValueError("A prompt is empty: generation needs at least one token to start from.")
    device = next(model.parameters()).device
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad_token_id, device=device)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = prompt.to(device)
        mask[i, width - len(prompt) :] = 1
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    training = model.training
    devices = [device.index or 0] if device.type == "cuda" else []
    try:
        model.eval()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            written = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad_token_id,
                use_cache=True,
                num_beams=1,
                repetition_penalty=1.0,
                **({"do_sample": False, "temperature": None, "top_k": None, "top_p": None} | drawn),
            )[:, width:]
    finally:
        model.train(training)
    ends = _end_tokens(model)
    rows = [_up_to_end(row, ends) for row in written]
    return _padded([p.to(device) for p in prompts], rows, pad_token_id)


def _end_tokens(model: Any) -> Tensor:
    found = model.generation_config.eos_token_id
    found = [] if found is None else found if isinstance(found, list) else [found]
    return torch.tensor(found, dtype=torch.long)


def _up_to_end(row: Tensor, ends: Tensor) -> Tensor:
    """The tokens up to the first end-of-sequence token, that included."""
    at = torch.isin(row, ends.to(row.device)).nonzero()
    return row[: int(at[0]) + 1] if len(at) else row


def _padded(prompts: Sequence[Tensor], rows: Sequence[Tensor], pad: int) -> dict[str, Tensor]:
    lengths = [len(p) + len(r) for p, r in zip(prompts, rows, strict=True)]
    ids = prompts[0].new_full((len(rows), max(lengths)), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        ids[i, : lengths[i]] = torch.cat([prompt, row])
        mask[i, : lengths[i]] = 1
        labels[i, len(prompt) : lengths[i]] = row
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def write_sequences(
    teacher: Any,
    prompts: Sequence[Sequence[int] | Tensor] | None = None,
    *,
    num_sequences: int = 64,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    batch_size: int = 8,
    seed: int = 0,
) -> Iterator[dict[str, list[int]]]:
    """Data that the teacher writes: sequence-level distillation (Kim & Rush 2016), or without any data at all.

    Args:
        teacher: A causal language model.
        prompts: Token ids; the teacher answers each once. If None, it writes the prompts too: from its start token, or
            where it has none from a random token each (LLM-QAT, Liu et al. 2023, section 3.1).
        num_sequences: How many to write where there are no prompts.
        max_new_tokens: Of each.
        temperature: Of the sampling; 0: greedy, which for Kim & Rush stands for the mode.
        batch_size: Sequences written together.
        seed: Of the draw.

    Yields:
        Rows with `input_ids` and `labels`, for `datasets.Dataset.from_list` or as they are.

    Raises:
        ValueError: There are no prompts, or a number is below 1.
    """
    for name, value in (
        ("num_sequences", num_sequences),
        ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if prompts is not None and not len(prompts):
        raise ValueError("prompts is empty: give at least one, or None to let the teacher write them.")
    starts = _starts(teacher, num_sequences, seed) if prompts is None else [torch.as_tensor(p) for p in prompts]
    for first in range(0, len(starts), batch_size):
        batch = continue_prompts(
            teacher,
            starts[first : first + batch_size],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed + first,
        )
        for ids, mask, labels in zip(*(batch[k].cpu() for k in ("input_ids", "attention_mask", "labels")), strict=True):
            kept = mask.bool()
            yield {"input_ids": ids[kept].tolist(), "labels": labels[kept].tolist()}


def _starts(teacher: Any, count: int, seed: int) -> list[Tensor]:
    config = teacher.config.get_text_config()
    start = getattr(teacher.generation_config, "bos_token_id", None)
    if start is not None and start < config.vocab_size:
        return [torch.tensor([start])] * count
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, config.vocab_size, (count, 1), generator=generator))
