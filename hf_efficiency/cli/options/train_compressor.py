"""Options of `hf-efficiency train-compressor`."""

from __future__ import annotations

import argparse

from hf_efficiency.cli.options.common import MODEL, add_placement

SUMMARY = "train a token classifier that shortens prompts, from what a model kept of a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("model", metavar="MODEL", help=f"the teacher, and the classifier's first layers: {MODEL}")
    parser.add_argument("text", metavar="FILE", help=".jsonl with the fields prompt and compression, or a plain text")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the classifier")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="of the classifier (default: 4)")
    parser.add_argument(
        "--ratio", type=float, default=0.5, help="that the teacher keeps of a plain text (default: 0.5)"
    )
    parser.add_argument("--max-examples", type=int, default=200, metavar="N", help="paragraphs read (default: 200)")
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="default: 1e-4")
    add_placement(parser)
