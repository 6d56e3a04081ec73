"""Options of `hf-efficiency bench-generate`."""

from __future__ import annotations

import argparse

from hf_efficiency.cli.options.common import MODEL, add_placement

SUMMARY = "compare drafts and caches on your own prompts: speed, memory, agreement with the plain text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("prompts", metavar="FILE", help="a prompt in each line, or .jsonl with a field 'prompt'")
    parser.add_argument(
        "--setting", action="append", metavar="'NAME=VALUE ...'", default=[], help="what to compare with plain "
        "generation, such as 'draft=lookup k=8' or 'cache=quantized bits=4 draft=lookup'; give one or more",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: 64)")
    parser.add_argument("--raw", action="store_true", help="go on with the prompts themselves: no chat template")
    parser.add_argument("--json", metavar="FILE", help="write the measurements there")
    parser.add_argument("--plot", metavar="FILE.png", help="draw them")
    add_placement(parser)
