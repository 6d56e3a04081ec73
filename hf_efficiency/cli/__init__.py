"""The command `hf-efficiency`: compress, measure, dequantize and publish a model from the terminal."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from hf_efficiency.cli.arguments import build_parser

if TYPE_CHECKING:
    from collections.abc import Sequence

# What a wrong argument, a broken file, a full disk or an absent package raises. Anything else is a bug and keeps its
# traceback.
_USER_ERRORS = (ValueError, TypeError, ImportError, OSError, SafetensorError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; by default that of the process).

    Returns:
        The exit status: 0 done, 1 the saved checkpoint differs from the model in memory, 2 bad input, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    args.argv = arguments
    try:
        # the commands load torch and transformers: only now, so that --help and typing errors answer at once
        command = importlib.import_module(f"hf_efficiency.cli.{args.module}")
        return int(command.run(args))
    except KeyboardInterrupt:
        print("hf-efficiency: interrupted", file=sys.stderr)
        return 130
    except _USER_ERRORS as error:
        if args.traceback:
            raise
        print(f"hf-efficiency: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
