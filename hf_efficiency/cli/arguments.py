"""What can be typed. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import importlib

from hf_efficiency import __version__
from hf_efficiency.cli.options.common import MODEL, add_measuring, add_placement

METHODS = ("rtn", "gptq", "awq", "nf4", "quip-sharp")
# Commands whose options lie in a module of their own in `hf_efficiency.cli.options`, which is named like the command
# with underscores; so is the module of `hf_efficiency.cli` that runs it.
_COMMANDS: tuple[str, ...] = (
    "bench-generate",
    "cache-teacher",
    "distill-draft",
    "finetune",
    "generate",
    "select",
    "train-compressor",
)


def build_parser() -> argparse.ArgumentParser:
    """The parser; the parsed arguments carry `module`, the module of `hf_efficiency.cli` whose `run` takes them."""
    parser = argparse.ArgumentParser(prog="hf-efficiency", description="Compress language models and measure the loss.")
    parser.add_argument("--version", action="version", version=f"hf-efficiency {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _quantize(_command(commands, common, "quantize", "compress a model, check the saved checkpoint, measure it"))
    _evaluate(_command(commands, common, "evaluate", "measure a model, alone or beside its original"))
    _dequantize(_command(commands, common, "dequantize", "write the dense model that a compressed one stands for"))
    push = _command(commands, common, "push", "upload a checkpoint folder to the Hub")
    push.add_argument("folder", metavar="DIR")
    push.add_argument("repo", metavar="REPO", help="user/name on the Hub")
    push.add_argument("--private", action="store_true", help="make the repository private if it is new")
    info = _command(commands, common, "info", "say what a checkpoint folder holds, without loading it")
    info.add_argument("folder", metavar="DIR")
    verify = _command(commands, common, "verify", "run a checkpoint in this process alone; print JSON")
    verify.add_argument("folder", metavar="DIR")
    verify.add_argument("--logits", metavar="FILE", help="safetensors with ids, and logits to compare with bit by bit")
    verify.add_argument("--speed", action="store_true", help="measure speed on the tensor prompt of that file")
    add_placement(verify)
    _kernels(
        _command(commands, common, "kernels", "build, check or upload the GPU kernels in the form of the Kernel Hub")
    )
    for name in _COMMANDS:
        options = importlib.import_module(f"hf_efficiency.cli.options.{name.replace('-', '_')}")
        options.add_arguments(_command(commands, common, name, options.SUMMARY))
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
    name: str,
    summary: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, parents=[common], help=summary, description=summary[0].upper() + summary[1:])
    parser.set_defaults(module=name.replace("-", "_"))
    return parser


def _quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the new checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    parser.add_argument("--resume", action="store_true", help="keep finished blocks in DIR.resume and go on from there")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the result")
    parser.add_argument("--private", action="store_true", help="make that repository private if it is new")
    # No defaults here: what is not typed is left to the method's config.
    method = parser.add_argument_group("the method (what is not given is left at the method's default)")
    method.add_argument("--bits", type=int)
    method.add_argument("--group-size", type=int, help="weights that share a scale; -1: a whole row")
    method.add_argument("--sym", action=argparse.BooleanOptionalAction, default=None, help="symmetric grid")
    method.add_argument(
        "--desc-act", action=argparse.BooleanOptionalAction, default=None, help="GPTQ's activation order"
    )
    method.add_argument("--refine-steps", type=int, metavar="N", help="learn the rounding in N steps a block")
    method.add_argument("--fine-tune", type=int, metavar="N", dest="fine_tune_steps", help="QuIP#'s tuning, N steps")
    method.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], help="any other field of the config"
    )
    data = parser.add_argument_group("calibration")
    data.add_argument("--calibration", metavar="default|self|FILE", help="text of the calibration (default: default)")
    data.add_argument("--num-samples", type=int, metavar="N", help="sequences")
    data.add_argument("--seq-len", type=int, metavar="N", help="tokens of each")
    data.add_argument("--batch-size", type=int, metavar="N", help="sequences that run together")
    data.add_argument("--seed", type=int)
    add_measuring(parser, "--eval-text")
    add_placement(parser)
    parser.add_argument("--no-eval", action="store_true", help="only save and check: no report, no model card")


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--reference", metavar="MODEL", help="the original, to compare with")
    parser.add_argument("--json", metavar="FILE", help="write the measurements there")
    add_measuring(parser, "--text")
    add_placement(parser)


def _dequantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--output", metavar="DIR", required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    add_placement(parser)


def _kernels(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    build = actions.add_parser("build", help="lay out projects as the kernels library loads them")
    build.add_argument("names", nargs="*", metavar="NAME", help="projects; by default all")
    build.add_argument("--output", dest="folder", default="build/kernels", help="folder for the builds (%(default)s)")
    check = actions.add_parser("check", help="load a build as the kernels library would")
    check.add_argument("folder", metavar="DIR", help="a build, such as build/kernels/quant_linear")
    push = actions.add_parser("push", help="check a build and upload it to the Hub")
    push.add_argument("folder", metavar="DIR")
    push.add_argument("repo", metavar="REPO", help="user/name on the Hub")
    push.add_argument("--private", action="store_true", help="make the repository private if it is new")
