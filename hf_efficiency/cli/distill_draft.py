"""`hf-efficiency distill-draft MODEL FILE`: train a draft towards the model that verifies it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_efficiency import DistillConfig, DistillTrainer, make_student
from hf_efficiency.cli.cache_teacher import cut
from hf_efficiency.cli.models import load_model, load_tokenizer, pick_device, resolve
from hf_efficiency.distillation.sampling import IGNORED
from hf_efficiency.distillation.trace import decoder_blocks
from hf_efficiency.evaluation import read_text
from hf_efficiency.saving import check_output, save_checkpoint

if TYPE_CHECKING:
    import argparse

_HELD_OUT = 0.1


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    for name, least in (("seq_len", 2), ("steps", 1), ("batch_size", 1), ("num_layers", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    check_output(args.output, overwrite=args.overwrite)
    with resolve(args.model) as source:
        tokenizer = load_tokenizer(source)
        rows = read_rows(args.data, tokenizer, args.seq_len, rejected_only=args.rejected_only)
        held = max(1, int(_HELD_OUT * len(rows)))
        if len(rows) <= held:
            raise ValueError(f"{args.data!r} gives {len(rows)} sequences: at least 2 are needed, one to measure on")
        teacher = load_model(source.path, args.dtype, args.device)
        student = _student(args, teacher)
        with tempfile.TemporaryDirectory(prefix="hf-efficiency-") as scratch:
            trainer = DistillTrainer(
                student,
                teacher,
                DistillConfig(
                    scratch,
                    max_steps=args.steps,
                    per_device_train_batch_size=args.batch_size,
                    per_device_eval_batch_size=args.batch_size,
                    learning_rate=args.learning_rate,
                    lr_scheduler_type="cosine",
                    warmup_steps=max(1, args.steps // 20),
                    use_cpu=pick_device(args.device) == "cpu",
                    save_strategy="no",
                    report_to="none",
                    logging_steps=max(1, args.steps // 10),
                ),
                train_dataset=rows[held:],
                eval_dataset=rows[:held],
                processing_class=tokenizer,
            )
            before = trainer.evaluate()
            trainer.train()
            after = trainer.evaluate()
        out = save_checkpoint(student.eval(), tokenizer, args.output, overwrite=args.overwrite)
    print(
        f"{out}: expected acceptance {before['eval_expected_acceptance']:.3f} before, "
        f"{after['eval_expected_acceptance']:.3f} after {args.steps} steps on {len(rows) - held} sequences "
        f"(measured on {held} others)"
    )
    return 0


def _student(args: argparse.Namespace, teacher: Any) -> Any:
    if args.draft is not None:
        with resolve(args.draft) as source:
            return load_model(source.path, args.dtype, args.device).train()
    count = args.num_layers if args.num_layers is not None else max(1, len(decoder_blocks(teacher)) // 3)
    return make_student(teacher, num_layers=count)


def read_rows(path: str, tokenizer: Any, seq_len: int, *, rejected_only: bool) -> list[dict[str, Any]]:
    """Sequences of a log, or of texts; labels where drafts were refused if only these are to be learned.

    Raises:
        ValueError: The file can't be read, holds no sequence, or is no log where one is needed.
    """
    text = read_text(path).text
    if Path(path).suffix != ".jsonl":
        if rejected_only:
            raise ValueError(f"--rejected-only needs a log of generate --log, and {path!r} is a text")
        return _cut(cut(tokenizer, [text], seq_len), path, seq_len)
    rows, texts = [], []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line) if line.strip() else None
            if entry is None:
                continue
            if "input_ids" in entry:
                rows += _logged(entry["input_ids"], set(entry["rejected"]), seq_len, rejected_only=rejected_only)
            else:
                texts.append(entry["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {path!r} is neither a log's nor an object with a text") from error
    if texts and rejected_only:
        raise ValueError(f"--rejected-only needs a log of generate --log, and {path!r} holds texts")
    if texts:
        rows += _cut(cut(tokenizer, texts, seq_len), path, seq_len)
    if not rows:
        raise ValueError(f"{path!r} holds no sequence to learn from")
    return rows


def _cut(sequences: list[list[int]], path: str, seq_len: int) -> list[dict[str, Any]]:
    if not sequences:
        raise ValueError(f"{path!r} is shorter than one sequence of --seq-len {seq_len} tokens")
    return [{"input_ids": sequence} for sequence in sequences]


def _logged(ids: list[int], rejected: set[int], seq_len: int, *, rejected_only: bool) -> list[dict[str, Any]]:
    """A text in pieces; of those without a refused draft none, if only these are learned."""
    rows = []
    for start in range(0, len(ids), seq_len):
        piece = ids[start : start + seq_len]
        labels = [token if not rejected_only or start + i in rejected else IGNORED for i, token in enumerate(piece)]
        if len(piece) > 1 and any(label != IGNORED for label in labels[1:]):
            rows.append({"input_ids": piece, "labels": labels})
    return rows
