"""Options of `hf-efficiency cache-teacher`."""

from __future__ import annotations

import argparse

from hf_efficiency.cli.options.common import MODEL, add_placement

SUMMARY = "run a teacher once over a text and keep what it says, so that distillation needs no teacher"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("model", metavar="MODEL", help=f"the teacher: {MODEL}")
    parser.add_argument("text", metavar="FILE", help="plain text, or .jsonl with a text field in each line")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the cache; an unfinished one goes on")
    parser.add_argument("--seq-len", type=int, default=512, metavar="N", help="tokens of a sequence (default: 512)")
    parser.add_argument("--max-sequences", type=int, metavar="N", help="read no more than so many")
    parser.add_argument("--top-k", type=int, default=64, metavar="K", help="tokens kept at each place (default: 64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the probabilities (default: 1)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="sequences that run together")
    add_placement(parser)
