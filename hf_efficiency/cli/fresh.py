"""Run a checkpoint in a process of its own: does it give the same logits again, how fast is it, what memory it takes.

Only a fresh process shows that the folder alone is enough, and only there the peak memory is that of one model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from hf_efficiency.evaluation.metrics import evaluating

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_CHECK_TOKENS = 64


@dataclass(frozen=True)
class FreshRun:
    """What `verify` prints."""

    peak_memory: int
    identical: bool | None = None
    max_difference: float | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None


def check_logits(model: PreTrainedModel, prompt: Tensor) -> dict[str, Tensor]:
    """The ids (1, at most 64) and the logits that a reloaded copy of `model` must give again, bit by bit."""
    ids = prompt.reshape(1, -1)[:, :_CHECK_TOKENS]
    with evaluating(model):
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    return {"ids": ids.contiguous(), "logits": logits.detach().cpu().contiguous()}


def run_fresh(
    folder: str | Path, dtype: str, device: str, *, prompt: Tensor | None = None, check: dict[str, Tensor] | None = None
) -> FreshRun:
    """Load `folder` in a new process, compare its logits with `check`, and time it on `prompt` (w,).

    Raises:
        ValueError: the process failed; the message is its own.
    """
    with tempfile.TemporaryDirectory(prefix="hf-efficiency-") as scratch:
        file = Path(scratch) / "check.safetensors"
        tensors = dict(check or {})
        if prompt is not None:
            tensors["prompt"] = prompt.reshape(-1).clone()  # safetensors refuses views of one tensor
        save_file(tensors, file, metadata={"threads": str(torch.get_num_threads())})
        command = [sys.executable, "-m", "hf_efficiency", "verify", str(folder), "--logits", str(file)]
        command += ["--dtype", dtype, "--device", device, *(["--speed"] if prompt is not None else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ValueError(f"the checkpoint does not run in a fresh process: {reason[0]}")
    return FreshRun(**json.loads(done.stdout.strip().splitlines()[-1]))
