"""`hf-efficiency train-compressor MODEL FILE`: distil a token classifier from what a teacher keeps (LLMLingua-2)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_efficiency.cli.models import load_model, load_tokenizer, resolve
from hf_efficiency.distillation.student import cut_depth
from hf_efficiency.evaluation import read_text
from hf_efficiency.saving import check_output, save_checkpoint

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    for name in ("layers", "max_examples", "epochs"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if not 0 < args.ratio < 1:
        raise ValueError(f"--ratio is {args.ratio}; it must lie between 0 and 1")
    from hf_efficiency.integrations.transformers.compression.classifier import labelled, train_classifier

    folder = check_output(args.output, overwrite=args.overwrite)
    written = _pairs(args.text) if Path(args.text).suffix == ".jsonl" else None
    with resolve(args.model) as source:
        tokenizer = load_tokenizer(source)
        teacher = load_model(source.path, args.dtype, args.device)
        pairs = (written or _kept(args, teacher, tokenizer))[: args.max_examples]
        student = _student(teacher, args.layers)
    losses = train_classifier(student, labelled(tokenizer, pairs), epochs=args.epochs, learning_rate=args.learning_rate)
    save_checkpoint(student, tokenizer, folder, overwrite=args.overwrite)
    print(f"{args.output}: {len(pairs)} pairs, loss {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in the last")
    return 0


def _pairs(file: str) -> list[tuple[str, str]]:
    found = []
    for number, line in enumerate(read_text(file).text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
                found.append((row["prompt"], row["compression"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {file!r} is no JSON object with the fields 'prompt' and 'compression'"
                ) from error
    return found


def _kept(args: argparse.Namespace, teacher: Any, tokenizer: Any) -> list[tuple[str, str]]:
    """Paragraphs of a plain text, and what the teacher keeps of each."""
    from hf_efficiency import compress_prompt

    paragraphs = [" ".join(p.split()) for p in read_text(args.text).text.split("\n\n") if len(p.split()) >= 20]
    if not paragraphs:
        raise ValueError(f"{args.text!r} has no paragraph of 20 words or more")
    return [
        (p, compress_prompt(p, ratio=args.ratio, method="llmlingua", model=teacher, tokenizer=tokenizer).text)
        for p in paragraphs[: args.max_examples]
    ]


def _student(teacher: Any, layers: int) -> Any:
    """A token classifier of the teacher's first layers."""
    import copy

    from transformers import AutoModelForTokenClassification

    config = copy.deepcopy(teacher.config)
    total = config.num_hidden_layers
    cut_depth(config, range(min(layers, total)), total)
    config.num_labels = 2
    config.quantization_config = None
    del config.quantization_config
    student = AutoModelForTokenClassification.from_config(config).float()
    state = {k: v for k, v in teacher.base_model.state_dict().items() if k in student.base_model.state_dict()}
    student.base_model.load_state_dict(state, strict=False)
    return student.to(teacher.device)
