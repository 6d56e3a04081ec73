"""`hf-efficiency quantize`: compress, save, check the saved copy in a fresh process, measure, write the model card."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from hf_efficiency.cli.configs import build_config
from hf_efficiency.cli.fresh import FreshRun, check_logits, run_fresh
from hf_efficiency.cli.models import Source, load_model, load_tokenizer, pick_device, quantization_of, resolve
from hf_efficiency.cli.publish import upload, write_report
from hf_efficiency.cli.texts import CalibrationText, calibration_text, evaluation_text
from hf_efficiency.evaluation import EvaluationText, Report, compare, peak_memory
from hf_efficiency.evaluation.metrics import check_window
from hf_efficiency.evaluation.report import OWN_PROCESS, size
from hf_efficiency.evaluation.text import token_windows
from hf_efficiency.saving import check_output, staged_folder

if TYPE_CHECKING:
    import argparse

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class _Job:
    """Everything that is known before the work begins; a wrong argument is found while this is put together."""

    args: argparse.Namespace
    out: Path
    device: str
    config: Any
    calibration: CalibrationText
    text: EvaluationText
    resume_dir: Path | None


def run(args: argparse.Namespace) -> int:
    """Carry out the command; exit status 1 if the saved checkpoint does not give the same logits again."""
    start = time.perf_counter()
    job = _prepare(args)
    with resolve(args.model) as source:
        if quantization_of(source.path) is not None:
            raise ValueError(
                f"{args.model!r} is already quantized ({quantization_of(source.path)}): dequantize it first "
                "(hf-efficiency dequantize), or start from the original"
            )
        tokenizer = load_tokenizer(source)
        check_window(AutoConfig.from_pretrained(source.path), args.window)
        prompt = token_windows(tokenizer, job.text.text, args.window, 1)[0]
        _say(f"Quantizing {args.model} with {args.method}")
        model = load_model(source.path, args.dtype, job.device, job.config)
        seconds, memory = time.perf_counter() - start, peak_memory(model.device)
        try:
            fresh = _save_and_check(job, model, tokenizer, prompt)
        except CheckpointDiffersError as error:
            print(f"hf-efficiency: {error}", file=sys.stderr)
            return 1
        if job.resume_dir is not None:
            shutil.rmtree(job.resume_dir, ignore_errors=True)
        if not args.no_eval:
            report = _measure(job, source, model, tokenizer, prompt, fresh)
            report.context.update(quantize_seconds=round(seconds, 1), quantize_peak_memory=memory)
            write_report(report, job.out)
            print(report.table())
        print(f"\n{job.out}: {args.method}, quantized in {seconds:.0f} s at a peak of {size(memory)} of memory, "
              f"logits identical after reloading; {time.perf_counter() - start:.0f} s in all")  # fmt: skip
    if args.push_to_hub:
        print(f"Uploaded to {upload(job.out, args.push_to_hub, private=args.private)}")
    return 0


def _prepare(args: argparse.Namespace) -> _Job:
    if not args.prompt.strip():
        raise ValueError("--prompt is empty")
    if args.max_windows < 1:
        raise ValueError(f"--max-windows is {args.max_windows}; it must be at least 1")
    out = check_output(args.output, overwrite=args.overwrite)
    resume_dir = out.with_name(f"{out.name}.resume") if args.resume else None
    calibration = calibration_text(args.calibration)
    # built before the model is loaded, so that a bad value costs no time
    config = build_config(args, calibration.value, str(resume_dir) if resume_dir else None)
    calibrated = bool(config.needs_calibration)
    if args.calibration is not None and not calibrated:
        raise ValueError(f"--calibration: {args.method} without refinement reads no calibration text")
    used = calibration if calibrated else CalibrationText(None, None, None)
    return _Job(args, out, pick_device(args.device), config, used, evaluation_text(args.eval_text, used), resume_dir)


def _save_and_check(job: _Job, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Tensor) -> FreshRun:
    """Save, reload in a fresh process and compare; only a checkpoint that is right takes the place of an old one."""
    check = check_logits(model, prompt)
    dtype = str(model.dtype).removeprefix("torch.")
    timed = None if job.args.no_eval else prompt
    with staged_folder(job.out) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        _say("Reloading in a fresh process")
        fresh = run_fresh(staging, dtype, job.device, prompt=timed, check=check)
        if not fresh.identical:
            raise CheckpointDiffersError(
                f"reloaded in a fresh process, the checkpoint gives logits that differ by up to "
                f"{fresh.max_difference}; nothing was written to {job.out}"
            )
    return fresh


class CheckpointDiffersError(Exception):
    """The saved checkpoint is not the model that was in memory."""


def _measure(
    job: _Job,
    source: Source,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Tensor,
    fresh: FreshRun,
) -> Report:
    """Both models on the evaluation text in this process, the original's speed and memory in one of its own."""
    args = job.args
    dtype = str(model.dtype).removeprefix("torch.")
    _say("Measuring the original and the compressed model")
    original = run_fresh(source.path, dtype, job.device, prompt=prompt)
    reference = load_model(source.path, dtype, job.device)
    report = compare(
        model,
        reference,
        tokenizer,
        job.text,
        window=args.window,
        max_windows=args.max_windows,
        prompt=args.prompt,
        speed=False,
        checkpoint=job.out,
        context=_context(job, source),
        progress=sys.stderr.isatty(),
    )
    for entry, run_alone in ((report.model, fresh), (report.reference, original)):
        entry.peak_memory = run_alone.peak_memory
        entry.prefill_tokens_per_second = run_alone.prefill_tokens_per_second
        entry.decode_tokens_per_second = run_alone.decode_tokens_per_second
    return report


def _context(job: _Job, source: Source) -> dict[str, Any]:
    known = {
        "method": job.args.method,
        "bits": getattr(job.config, "bits", None),
        "command": shlex.join(["hf-efficiency", *job.args.argv]),
        "calibration": job.calibration.description,
        "shared_with_calibration": job.calibration.overlap(job.text.text),
        "base_model": source.base_model,
        "license": source.license,
        "languages": source.languages,
        "note": source.note,
        "memory_scope": OWN_PROCESS,
    }
    calibrated = {field: getattr(job.config, field) for field in ("num_samples", "seq_len")}
    if job.calibration.description is not None:
        known["calibration"] = "{} ({num_samples} sequences of {seq_len} tokens)".format(
            job.calibration.description, **calibrated
        )
    return {key: value for key, value in known.items() if value is not None}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
