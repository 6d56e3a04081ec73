"""`hf-efficiency verify`: what `cli.fresh` starts; prints one line of JSON, exit status 1 if the logits differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from hf_efficiency.cli.models import load_model
from hf_efficiency.evaluation import measure_speed, peak_memory
from hf_efficiency.evaluation.metrics import evaluating

if TYPE_CHECKING:
    import argparse

    from torch import Tensor
    from transformers import PreTrainedModel


def run(args: argparse.Namespace) -> int:
    """Load the folder, compare and time as the file given by --logits asks."""
    tensors, metadata = _read(args.logits) if args.logits else ({}, {})
    if "threads" in metadata:
        torch.set_num_threads(int(metadata["threads"]))
    model = load_model(args.folder, args.dtype, args.device)
    result: dict[str, Any] = {}
    if "logits" in tensors:
        result.update(_compare(model, tensors["ids"], tensors["logits"]))
    if args.speed:
        if "prompt" not in tensors:
            raise ValueError("--speed needs a tensor called prompt in the file given by --logits")
        speed = measure_speed(model, tensors["prompt"])
        result["prefill_tokens_per_second"] = speed.prefill_tokens_per_second
        result["decode_tokens_per_second"] = speed.decode_tokens_per_second
    result["peak_memory"] = peak_memory(model.device)
    print(json.dumps(result))
    return 0 if result.get("identical", True) else 1


def _compare(model: PreTrainedModel, ids: Tensor, expected: Tensor) -> dict[str, Any]:
    with evaluating(model):
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits.cpu()
    if logits.shape != expected.shape or logits.dtype != expected.dtype:
        raise ValueError(
            f"the reloaded model gives {logits.dtype} logits of shape {tuple(logits.shape)}, the saved ones are "
            f"{expected.dtype} of shape {tuple(expected.shape)}"
        )
    difference = (logits.double() - expected.double()).abs().max().item()
    return {"identical": torch.equal(logits, expected), "max_difference": difference}


def _read(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not Path(path).is_file():
        raise ValueError(f"the file {path!r} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path!r} is no safetensors file: {error}") from error
