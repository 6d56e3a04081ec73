"""Options that several commands share."""

from __future__ import annotations

import argparse

DEFAULT_PROMPT = "Explain in two sentences why the sky is blue."
MODEL = "a Hub id, a checkpoint folder, a .gguf file, or smollm2-135m (the demo model)"


def add_measuring(parser: argparse.ArgumentParser, text: str) -> None:
    """What is read and answered when models are measured; `text` is the option's name."""
    group = parser.add_argument_group("measuring")
    group.add_argument(
        text, dest="eval_text", metavar="default|FILE", default="default", help="text that is read (default: prose of "
        "Python's standard library)",
    )  # fmt: skip
    group.add_argument("--window", type=int, default=512, metavar="N", help="tokens a window (default: 512)")
    group.add_argument("--max-windows", type=int, default=16, metavar="N", help="windows read (default: 16)")
    group.add_argument("--prompt", default=DEFAULT_PROMPT, help=f"what the models answer (default: {DEFAULT_PROMPT!r})")


def add_placement(parser: argparse.ArgumentParser) -> None:
    """The dtype and the device of a model."""
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of activations and dense weights")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
