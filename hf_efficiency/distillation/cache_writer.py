"""Runs a teacher once and writes down what it says; see `teacher_cache`.

Shape legend: b batch, t tokens of a sequence, k tokens kept.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_efficiency.distillation.heads import OutputHead
from hf_efficiency.distillation.targets import top_k as most_likely
from hf_efficiency.distillation.teacher_cache import (
    MANIFEST,
    VERSION,
    TeacherCache,
    arrow,
    data_checksum,
    model_checksum,
    read_manifest,
    sequence_key,
    tokenizer_checksum,
)
from hf_efficiency.distillation.teachers import ModelTeacher

_LARGEST_UINT16 = 2**16


def cache_teacher(
    teacher: Any,
    sequences: Sequence[Sequence[int] | Tensor],
    folder: str | Path,
    *,
    tokenizer: Any = None,
    top_k: int = 64,
    temperature: float = 1.0,
    batch_size: int = 4,
    shard_size: int = 256,
    vocab_size: int | None = None,
    progress: bool = False,
) -> TeacherCache:
    """Writes the teacher's k most likely next tokens of every token, and the mass of all others.

    A run that was interrupted goes on when it is started again with the same arguments; a finished one is only opened.

    Args:
        teacher: A causal language model, quantized or not.
        sequences: Token ids, each of at least 2 tokens.
        folder: New, or that of an unfinished run.
        tokenizer: Its checksum is kept, so that training with another one is noticed.
        top_k: k. What is left out enters as one outcome, "any other token".
        temperature: Of the probabilities; training must use the same.
        batch_size: Sequences that run together.
        shard_size: Sequences of a file, which is the most that an interruption costs.
        vocab_size: Columns of the logits that count, where embeddings are padded; None: all.
        progress: Show a progress bar.

    Raises:
        ValueError: No data, a setting out of its range, or a folder with another cache.
    """
    arrow()
    manifest = _manifest(teacher, sequences, tokenizer, top_k, temperature, batch_size, shard_size, vocab_size)
    target = Path(folder)
    if _begin(target, manifest):
        return TeacherCache(target)
    training = teacher.training
    try:
        asked = ModelTeacher(teacher)
        with tqdm(total=len(sequences), desc="caching", unit="sequence", disable=not progress) as bar:
            for i, name in enumerate(manifest["shards"]):
                chosen = sequences[i * shard_size : (i + 1) * shard_size]
                if not (target / name).is_file():
                    _write_shard(asked, chosen, target / name, manifest, batch_size)
                bar.update(len(chosen))
    finally:
        teacher.train(training)
    _write_manifest(target, {**manifest, "complete": True})
    return TeacherCache(target)


def _manifest(
    teacher: Any,
    sequences: Sequence[Sequence[int] | Tensor],
    tokenizer: Any,
    top_k: int,
    temperature: float,
    batch_size: int,
    shard_size: int,
    vocab_size: int | None,
) -> dict[str, Any]:
    """What the cache is made from, once that is checked."""
    for name, value in (("top_k", top_k), ("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0.")
    if not len(sequences) or min(len(s) for s in sequences) < 2:
        raise ValueError("The data is empty or holds a sequence of fewer than 2 tokens, which predicts nothing.")
    width = vocab_size or OutputHead(teacher).size
    if top_k >= width:
        raise ValueError(f"top_k={top_k} must be below the vocabulary's {width}.")
    shards = -(-len(sequences) // shard_size)
    return {
        "version": VERSION,
        "teacher": model_checksum(teacher),
        "tokenizer": None if tokenizer is None else tokenizer_checksum(tokenizer),
        "data": data_checksum(sequences),
        "sequences": len(sequences),
        "tokens": sum(len(s) for s in sequences),
        "top_k": top_k,
        "temperature": float(temperature),
        "vocab_size": width,
        "shards": [f"shard-{i:05d}.arrow" for i in range(shards)],
        "complete": False,
    }


def _begin(folder: Path, manifest: dict[str, Any]) -> bool:
    """Prepares the folder; True if the cache is finished already.

    Raises:
        ValueError: It holds another cache, or something else.
    """
    if not (folder / MANIFEST).is_file():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"The folder {str(folder)!r} is not empty and holds no teacher cache: choose another one.")
        folder.mkdir(parents=True, exist_ok=True)
        _write_manifest(folder, manifest)
        return False
    found = read_manifest(folder)
    differing = [key for key in manifest if key != "complete" and found.get(key) != manifest[key]]
    if differing:
        named = ", ".join(f"{key} ({_short(found.get(key))} there, {_short(manifest[key])} here)" for key in differing)
        raise ValueError(
            f"The folder {str(folder)!r} holds a teacher cache that was made otherwise: {named}. Give the same "
            "teacher, tokenizer, data and settings to go on with it, or choose another folder."
        )
    return bool(found["complete"])


def _short(value: Any) -> str:
    return f"{len(value)} files" if isinstance(value, list) else str(value)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    partial = folder / f".{MANIFEST}.part"
    partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / MANIFEST)


def _write_shard(
    teacher: ModelTeacher,
    sequences: Sequence[Sequence[int] | Tensor],
    path: Path,
    manifest: dict[str, Any],
    batch_size: int,
) -> None:
    """Runs the teacher on the sequences of one file; the file appears whole or not at all."""
    pa = arrow()
    small = np.uint16 if manifest["vocab_size"] <= _LARGEST_UINT16 else np.int32
    columns: dict[str, list[Any]] = {name: [] for name in ("key", "input_ids", "top_ids", "log_p", "log_rest")}
    for first in range(0, len(sequences), batch_size):
        batch = [torch.as_tensor(s) for s in sequences[first : first + batch_size]]
        for ids, (top, log_p, rest) in zip(batch, _answers(teacher, batch, manifest), strict=True):
            columns["key"].append(sequence_key(ids))
            columns["input_ids"].append(ids.numpy().astype(np.int32))
            columns["top_ids"].append(top.numpy().astype(small).reshape(-1))
            columns["log_p"].append(log_p.half().numpy().reshape(-1))
            columns["log_rest"].append(rest.numpy())
    types = {"input_ids": pa.int32(), "top_ids": pa.from_numpy_dtype(small), "log_p": pa.float16()}
    arrays = {"key": pa.array(columns.pop("key"), pa.binary(16))}
    arrays |= {name: pa.array(values, pa.list_(types.get(name, pa.float32()))) for name, values in columns.items()}
    table = pa.table(arrays)
    partial = path.with_name(f".{path.name}.part")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    os.replace(partial, path)


def _answers(
    teacher: ModelTeacher, batch: Sequence[Tensor], manifest: dict[str, Any]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each sequence (t,) the top ids (t - 1, k), their log-probabilities and the log of the rest (t - 1,)."""
    device = teacher.model.get_input_embeddings().weight.device
    width = max(len(ids) for ids in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(batch):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    rows: Any = teacher.answer(inputs, inputs["attention_mask"][:, 1:].bool()).rows  # of a model: they give logits
    results, first = [], 0
    for row in batch:
        part = slice(first, first + len(row) - 1)
        first = part.stop
        kept = most_likely(rows(part)[:, : manifest["vocab_size"]], manifest["top_k"], manifest["temperature"])
        results.append((kept.ids.cpu(), kept.log_p.cpu(), kept.log_rest.cpu()))
    return results
