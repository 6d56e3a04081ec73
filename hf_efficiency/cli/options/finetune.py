"""What `hf-efficiency finetune` takes."""

from __future__ import annotations

import argparse

from hf_efficiency.cli.options.common import MODEL

SUMMARY = "train an adapter on a model, quantized or dense, with a text or chat file (QLoRA)"
QUANTIZERS = ("nf4", "rtn")
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit", "adafactor", "sgd")
SCHEDULES = ("constant", "linear", "cosine")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL}; a quantized checkpoint is trained on as it is")
    parser.add_argument("--data", metavar="FILE", required=True, help=".txt, or .jsonl with text, messages, or prompt "
                        "and completion in each line")  # fmt: skip
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the new adapter")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that is there")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run, from DIR.resume")
    _adapter(parser.add_argument_group("base and adapter"))
    _data(parser.add_argument_group("data"))
    _training(parser.add_argument_group("training"))


def _adapter(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--quantize", metavar="|".join(QUANTIZERS), help="quantize the dense base while loading it "
                       "(for methods that calibrate, run hf-efficiency quantize first)")  # fmt: skip
    group.add_argument(
        "--quantize-set", metavar="NAME=VALUE", action="append", default=[], help="a field of its config"
    )
    group.add_argument("--peft", metavar="TYPE", default="lora", help="any type that PEFT knows, ours among them; dora "
                       "and rslora too (default: lora)")  # fmt: skip
    group.add_argument("--r", type=int, help="rank")
    group.add_argument("--alpha", type=float, help="scale of the adapter (lora_alpha)")
    group.add_argument("--targets", metavar="NAME,...", help="layers, or all-linear (the default where the type has a "
                       "rank)")  # fmt: skip
    group.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help="any other field of the "
                       "type's config")  # fmt: skip


def _data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--seq-len", type=int, default=512, metavar="N", help="tokens a sequence (default: 512)")
    group.add_argument("--packing", action=argparse.BooleanOptionalAction, default=None, help="fill sequences with "
                       "several rows, which don't see each other, instead of padding (default: on, but for types that "
                       "put virtual tokens before each sequence)")  # fmt: skip
    group.add_argument("--loss-on", choices=("completion", "all"), default="completion", help="chat data: train on "
                       "what the assistant says, or on all tokens (default: completion)")  # fmt: skip
    group.add_argument("--chat-template", metavar="FILE", help="Jinja template in place of the tokenizer's")
    group.add_argument("--eval-data", metavar="FILE", help="held-out data (default: the last 5 %% of the data)")
    group.add_argument("--eval-rows", type=int, default=32, metavar="N", help="held-out sequences read (default: 32)")


def _training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=float, default=1.0, help="passes over the data (default: 1)")
    group.add_argument("--max-steps", type=int, metavar="N", help="steps, in place of --epochs")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences a step, over all processes "
                       "(default: 8)")  # fmt: skip
    group.add_argument("--micro-batch", type=int, metavar="N", help="sequences that one process runs at a time")
    group.add_argument("--learning-rate", type=float, default=2e-4, metavar="X", help="(default: 2e-4)")
    group.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="of the learning rate")
    group.add_argument("--warmup-steps", type=int, default=0, metavar="N")
    group.add_argument("--weight-decay", type=float, default=0.0, metavar="X")
    group.add_argument("--max-grad-norm", type=float, default=1.0, metavar="X")
    group.add_argument("--optimizer", choices=OPTIMIZERS, help="(default: adamw; the type galore "
                       "brings its own)")  # fmt: skip
    group.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=None,
                       help="recompute activations in the backward pass (default: if the type can)")  # fmt: skip
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the base and the "
                       "activations; bfloat16 also turns autocast on (default: that of the checkpoint)")  # fmt: skip
    group.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--save-steps", type=int, default=50, metavar="N", help="steps between checkpoints in "
                       "DIR.resume; 0 for none (default: 50)")  # fmt: skip
