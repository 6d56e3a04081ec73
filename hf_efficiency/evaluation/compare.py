"""Measure a compressed model beside its original."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hf_efficiency
from hf_efficiency.evaluation.answers import answer
from hf_efficiency.evaluation.footprint import bits_per_weight, bytes_on_disk, peak_memory
from hf_efficiency.evaluation.metrics import kl_and_agreement
from hf_efficiency.evaluation.report import GPU_TENSORS, SHARED_PROCESS, Measurements, Report
from hf_efficiency.evaluation.speed import measure_speed
from hf_efficiency.evaluation.text import EvaluationText, join_text, token_windows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def compare(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str] | EvaluationText,
    *,
    window: int = 512,
    max_windows: int | None = 48,
    prompt: str | None = None,
    speed: bool = True,
    decode_tokens: int = 32,
    repeats: int = 3,
    checkpoint: str | Path | None = None,
    reference_checkpoint: str | Path | None = None,
    context: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Report:
    """Measure `model` against `reference` on the first `max_windows` windows of `text`, which neither should have seen.

    Args:
        model: the compressed model.
        reference: the original; both read one window at a time, so memory holds the logits of two windows at most.
        tokenizer: of both.
        text: what is read; an `EvaluationText` also says what it is.
        window: tokens a window; see `perplexity`.
        max_windows: windows read; None for all.
        prompt: lets both models answer it (greedy, at most 96 tokens).
        speed: time both models too, on a prompt of one window; False leaves speed and peak memory out.
        decode_tokens: tokens generated for the decode speed.
        repeats: timed runs, of which the median counts.
        checkpoint: the compressed model's folder, for its bytes on disk; without it they are counted in memory.
        reference_checkpoint: the same for the original.
        context: what else the report should say; see `Report.context`.
        progress: show a progress bar.

    Peak memory on a CPU is that of this process, which holds both models; see `peak_memory`.

    Raises:
        TypeError: `text` holds something else than strings.
        ValueError: as `kl_and_agreement` and `measure_speed`.
    """
    named = text if isinstance(text, EvaluationText) else EvaluationText(join_text(text), _described(text))
    drift = kl_and_agreement(model, reference, tokenizer, named.text, window, max_windows, progress=progress)
    # the timed prompt is the first window
    ids = token_windows(tokenizer, named.text, window, 1) if speed else None
    measured = []
    for each, folder, value in (
        (model, checkpoint, drift.perplexity),
        (reference, reference_checkpoint, drift.reference_perplexity),
    ):
        entry = _sizes(each, folder, value)
        if ids is not None:
            _add_speed(entry, each, ids, decode_tokens, repeats)
        if prompt is not None:
            entry.answer = answer(each, tokenizer, prompt)
        measured.append(entry)
    base = describe_run(model)
    base.update(text=named.description, window=window, windows=drift.tokens // (window - 1), tokens=drift.tokens)
    if prompt is not None:
        base["prompt"] = prompt
    if speed:
        base["memory_scope"] = GPU_TENSORS if model.device.type == "cuda" else SHARED_PROCESS
    return Report(measured[0], measured[1], drift.mean_kl, drift.top1_agreement, {**base, **(context or {})})


def describe_run(model: PreTrainedModel) -> dict[str, Any]:
    """The part of `Report.context` that a model and this machine know: dtype, device, threads, versions, method."""
    device = model.device
    config = getattr(model.config, "quantization_config", None)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {
            "hf_efficiency": hf_efficiency.__version__,
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
            "python": platform.python_version(),
        },
        "quantization": config if config is None or isinstance(config, dict) else config.to_dict(),
    }


def _sizes(model: PreTrainedModel, folder: str | Path | None, perplexity: float) -> Measurements:
    bits = bits_per_weight(model)
    return Measurements(
        perplexity=perplexity,
        bytes_on_disk=bytes_on_disk(model if folder is None else folder),
        bits_per_weight=bits.total,
        bits_per_quantized_weight=bits.quantized,
    )


def _add_speed(entry: Measurements, model: PreTrainedModel, ids: Tensor, new_tokens: int, repeats: int) -> None:
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    timed = measure_speed(model, ids, new_tokens, repeats)
    entry.prefill_tokens_per_second = timed.prefill_tokens_per_second
    entry.decode_tokens_per_second = timed.decode_tokens_per_second
    entry.peak_memory = peak_memory(model.device)


def _described(text: str | Sequence[str]) -> str:
    return f"a text of {len(text):,} characters" if isinstance(text, str) else f"{len(text):,} texts"


def _cpu_name() -> str:
    """The processor's name where Linux tells it, else the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.machine()
