"""Options of `hf-efficiency distill-draft`."""

from __future__ import annotations

import argparse

from hf_efficiency.cli.options.common import MODEL, add_placement

SUMMARY = "train a small draft of a model for speculative decoding, from the logs of refused drafts or from texts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("model", metavar="MODEL", help=f"the target: {MODEL}")
    parser.add_argument(
        "data", metavar="FILE", help="a log of generate --log, plain text, or .jsonl with a text field in each line"
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the draft")
    parser.add_argument("--overwrite", action="store_true", help="replace a draft that is there")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--draft", metavar="DIR", help="a draft to train on; by default some of the target's blocks")
    start.add_argument("--num-layers", type=int, metavar="N", help="blocks of a new draft (default: a third)")
    parser.add_argument("--rejected-only", action="store_true", help="learn only where drafts were refused (logs)")
    parser.add_argument("--seq-len", type=int, default=256, metavar="N", help="tokens of a sequence (default: 256)")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="(default: 200)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="sequences a step (default: 4)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, metavar="R", help="(default: 0.0005)")
    add_placement(parser)
