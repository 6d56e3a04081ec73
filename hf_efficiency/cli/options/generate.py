"""Options of `hf-efficiency generate`."""

from __future__ import annotations

import argparse

from hf_efficiency.cli.options.common import DEFAULT_PROMPT, MODEL, add_placement

SUMMARY = "let a model write, with drafts and caches that make it faster or smaller"
DRAFT = "lookup (from the text itself), self, skip:N (N of the model's own blocks), or a smaller model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", default=DEFAULT_PROMPT, help=f"what to answer (default: {DEFAULT_PROMPT!r})")
    given.add_argument("--prompt-file", metavar="FILE", help="a text file with the prompt")
    parser.add_argument("--raw", action="store_true", help="go on with the prompt itself: no chat template")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="(default: 256)")
    sampling = parser.add_argument_group("sampling (greedy without a temperature)")
    sampling.add_argument("--temperature", type=float, metavar="T")
    sampling.add_argument("--top-k", type=int, metavar="N")
    sampling.add_argument("--top-p", type=float, metavar="P")
    sampling.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    drafts = parser.add_argument_group("speculative decoding")
    drafts.add_argument("--draft", metavar="DRAFT", help=DRAFT)
    drafts.add_argument("--k", type=int, default=8, metavar="N", help="longest chain of drafted tokens (default: 8)")
    drafts.add_argument("--branching", metavar="N,N,...", help="a tree: children of each node by depth, such as 3,2,1")
    drafts.add_argument("--no-adapt", action="store_true", help="always draft as much as that, whether it pays or not")
    drafts.add_argument("--log", metavar="FILE.jsonl", help="add texts and refused drafts there, for distill-draft")
    caches = parser.add_argument_group("key-value cache")
    caches.add_argument(
        "--cache", metavar="NAME[,OPTION=VALUE...]", help="such as quantized,bits=4 or h2o,budget=256,recent=64"
    )
    shorter = parser.add_argument_group("prompt compression")
    shorter.add_argument("--compress", type=float, metavar="RATIO", help="share of the prompt's tokens to keep")
    shorter.add_argument("--question", metavar="TEXT", help="what is asked of the prompt; put after it, never cut")
    shorter.add_argument("--compress-with", metavar="MODEL", help="a small model that judges (default: MODEL itself)")
    add_placement(parser)
