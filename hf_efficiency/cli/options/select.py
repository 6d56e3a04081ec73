"""Options of `hf-efficiency select`."""

from __future__ import annotations

import argparse

from hf_efficiency.cli.options.common import MODEL, add_placement

SUMMARY = "choose, clean or deduplicate training data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument(
        "data", metavar="FILE|DATASET", help="a .txt (one text a line), .jsonl or .parquet file, a folder saved by "
        "datasets, or a Hub id",
    )  # fmt: skip
    parser.add_argument("--strategy", required=True, metavar="NAME", help="dsir, minhash, perplexity ...; 'list' lists")
    parser.add_argument("--output", metavar="DIR", help="folder for the subset, the scores and the report")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--k", type=int, metavar="N", help="rows to choose")
    parser.add_argument("--fraction", type=float, metavar="F", help="share of the rows to choose, instead of --k")
    parser.add_argument("--target", metavar="FILE", help="examples of what is wanted, in a file as above")
    parser.add_argument("--model", metavar="MODEL", help=MODEL)
    parser.add_argument("--text-column", metavar="NAME", help="column with the text (default: the first usual one)")
    parser.add_argument("--split", default="train", metavar="NAME", help="of a dataset (default: train)")
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help="a setting of the strategy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows the model sees together")
    parser.add_argument("--max-length", type=int, default=512, metavar="N", help="tokens of a row the model sees")
    parser.add_argument("--resume", action="store_true", help="keep scores in DIR.scores as they come, and go on there")
    add_placement(parser)
