"""From command-line options to a method's config. The config classes say which options a method has."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import hf_efficiency

if TYPE_CHECKING:
    import argparse

_CLASSES = {
    "rtn": "RTNConfig",
    "gptq": "GPTQConfig",
    "awq": "AWQConfig",
    "nf4": "NF4Config",
    "quip-sharp": "QuIPSharpConfig",
}
# Options of the command line that are fields of a config, under the same name.
_OPTIONS = ("bits", "group_size", "sym", "desc_act", "refine_steps", "fine_tune_steps", "num_samples", "seq_len",
            "batch_size", "seed")  # fmt: skip
# Fields that the command line sets itself.
_RESERVED = {"calibration", "tokenizer", "quant_method", "resume_dir", "progress"}


def build_config(args: argparse.Namespace, calibration: Any, resume_dir: str | None) -> Any:
    """The config of `args.method` with the options that were typed.

    Raises:
        ValueError: an option that the method does not have, or a value that it refuses.
    """
    cls = getattr(hf_efficiency, _CLASSES[args.method])
    fields = {field.name for field in dataclasses.fields(cls)}
    given = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    for name in given:
        if name not in fields:
            option = name.removesuffix("_steps") if name == "fine_tune_steps" else name
            raise ValueError(f"--{option.replace('_', '-')}: the method {args.method} has no such option")
    for assignment in args.set:
        name, value = parse_assignment(assignment)
        if name not in fields - _RESERVED:
            known = ", ".join(sorted(fields - _RESERVED - set(_OPTIONS)))
            raise ValueError(f"--set {name}: the method {args.method} has no such field; it has {known}")
        given[name] = value
    if calibration is not None:
        given["calibration"] = calibration
    return cls(**given, resume_dir=resume_dir)


def parse_assignment(text: str) -> tuple[str, Any]:
    """`name=value` with a JSON value; what is no JSON is a string, so that `mode=fast` works.

    Raises:
        ValueError: there is no name or no equals sign.
    """
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError(f"--set {text}: write it as NAME=VALUE, for example --set damp_percent=0.05")
    try:
        return name.replace("-", "_"), json.loads(value)
    except json.JSONDecodeError:
        return name.replace("-", "_"), value
