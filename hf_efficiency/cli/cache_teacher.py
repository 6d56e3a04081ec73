"""`hf-efficiency cache-teacher MODEL FILE`: run a teacher once, and keep what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_efficiency.cli.models import load_model, load_tokenizer, resolve
from hf_efficiency.distillation.cache_writer import cache_teacher
from hf_efficiency.evaluation import read_text
from hf_efficiency.evaluation.report import size

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    for name in ("seq_len", "top_k", "batch_size", "max_sequences"):
        value, least = getattr(args, name), 2 if name == "seq_len" else 1
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    texts = _texts(args.text)
    with resolve(args.model) as source:
        tokenizer = load_tokenizer(source)
        sequences = cut(tokenizer, texts, args.seq_len)[: args.max_sequences]
        if not sequences:
            raise ValueError(f"the text is shorter than one sequence of --seq-len {args.seq_len} tokens")
        cache = cache_teacher(
            load_model(source.path, args.dtype, args.device),
            sequences,
            args.output,
            tokenizer=tokenizer,
            top_k=args.top_k,
            temperature=args.temperature,
            batch_size=args.batch_size,
            progress=sys.stderr.isatty(),
        )
    held = sum(path.stat().st_size for path in cache.folder.iterdir())
    tokens = cache.manifest["tokens"]
    print(f"{args.output}: {len(cache)} sequences, {tokens} tokens, {size(held)} ({held / tokens:.0f} bytes a token)")
    return 0


def _texts(file: str) -> list[str]:
    """The documents of a file.

    Raises:
        ValueError: It cannot be read, or a line of a .jsonl file has no text.
    """
    if Path(file).suffix != ".jsonl":
        return [read_text(file).text]
    texts = []
    for number, line in enumerate(read_text(file).text.splitlines(), 1):
        if line.strip():
            try:
                texts.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"line {number} of {file!r} is no JSON object with a field 'text'") from error
    return texts


def cut(tokenizer: Any, texts: list[str], seq_len: int) -> list[list[int]]:
    """Documents one after the other, with the end-of-sequence token between them, in pieces of `seq_len` tokens."""
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(texts) > 1 and tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
    return [stream[i : i + seq_len] for i in range(0, len(stream) - seq_len + 1, seq_len)]
