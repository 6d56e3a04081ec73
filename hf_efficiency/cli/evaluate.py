"""`hf-efficiency evaluate MODEL`: measure one model, or a compressed one beside its original."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hf_efficiency.cli.models import load_model, load_tokenizer, pick_device, resolve
from hf_efficiency.cli.texts import CalibrationText, evaluation_text
from hf_efficiency.evaluation import (
    EvaluationText,
    Measurements,
    answer,
    bits_per_weight,
    bytes_on_disk,
    compare,
    measure_speed,
    peak_memory,
    perplexity,
)
from hf_efficiency.evaluation.report import rows_of
from hf_efficiency.evaluation.text import token_windows

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    text = evaluation_text(args.eval_text, CalibrationText(None, None, None))
    return _alone(args, text) if args.reference is None else _beside(args, text)


def _alone(args: argparse.Namespace, text: EvaluationText) -> int:
    with resolve(args.model) as source:
        tokenizer = load_tokenizer(source)
        model = load_model(source.path, args.dtype, pick_device(args.device))
        progress = sys.stderr.isatty()
        value = perplexity(model, tokenizer, text.text, args.window, args.max_windows, progress=progress)
        speed = measure_speed(model, token_windows(tokenizer, text.text, args.window, 1))
        bits = bits_per_weight(model)
        measured = Measurements(
            perplexity=value,
            bytes_on_disk=bytes_on_disk(model),
            bits_per_weight=bits.total,
            bits_per_quantized_weight=bits.quantized,
            peak_memory=peak_memory(model.device),
            prefill_tokens_per_second=speed.prefill_tokens_per_second,
            decode_tokens_per_second=speed.decode_tokens_per_second,
            answer=answer(model, tokenizer, args.prompt),
        )
    if args.json:
        content = {"text": text.description, "window": args.window, **dataclasses.asdict(measured)}
        Path(args.json).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for label, shown in rows_of(measured):
        print(f"{label:<40}{shown:>12}")
    print(f"\nText: {text.description}\nPrompt: {args.prompt}\n{measured.answer}")
    return 0


def _beside(args: argparse.Namespace, text: EvaluationText) -> int:
    device = pick_device(args.device)
    with resolve(args.model) as source, resolve(args.reference) as original:
        tokenizer = load_tokenizer(original)
        model = load_model(source.path, args.dtype, device)
        reference = load_model(original.path, str(model.dtype).removeprefix("torch."), device)
        report = compare(
            model,
            reference,
            tokenizer,
            text,
            window=args.window,
            max_windows=args.max_windows,
            prompt=args.prompt,
            context={"command": shlex.join(["hf-efficiency", *args.argv])},
            progress=sys.stderr.isatty(),
        )
    if args.json:
        report.to_json(args.json)
    print(report.table())
    print(f"\nText: {text.description}\nPrompt: {args.prompt}")
    print(f"Original: {report.reference.answer}\nCompressed: {report.model.answer}")
    return 0
