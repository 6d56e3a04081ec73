"""Base and adapter of `hf-efficiency finetune`: from what was typed to configs, checked before a model is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from typing import TYPE_CHECKING, Any

import hf_efficiency
from hf_efficiency.cli.configs import parse_assignment
from hf_efficiency.cli.options.finetune import QUANTIZERS
from hf_efficiency.quantization.layers.base import QuantizedLinear

if TYPE_CHECKING:
    import argparse

    from peft import PeftConfig, PeftModel
    from transformers import TrainerCallback

_BASES = {"nf4": "NF4Config", "rtn": "RTNConfig"}
_CALIBRATED = ("gptq", "awq", "quip-sharp")
# Fields that only methods that calibrate heed.
_NOT_FOR_ROUNDING = {"quant_method", "calibration", "tokenizer", "num_samples", "seq_len", "batch_size", "seed",
                     "offload", "resume_dir", "progress", "refine_steps", "refine_lr", "refine_batch_size"}  # fmt: skip
# Names for what PEFT has as a switch of another type.
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("lora", {"use_dora": True}),
    "rslora": ("lora", {"use_rslora": True}),
}
# Options and the fields that they set; the first that the type has.
_RANKS = ("target_r", "r", "rank")
_ALPHAS = ("lora_alpha", "alpha")
# Fields that the command sets, or that make no sense in it.
_RESERVED = {"task_type", "peft_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"}
# These have their own defaults for each architecture, which say which layers are feed-forward.
_OWN_TARGETS = {"ia3"}
# The callback without which a type does not do what its paper says.
_CALLBACKS = {"adalora": "AdaLoRACallback", "adadora": "AdaLoRACallback", "sora": "SoRACallback"}
_VIRTUAL_TOKENS = 20  # of prompt and prefix tuning, which have no default
_UNKNOWN_YET = 10**9  # steps; the callback of AdaLoRA puts in how many there really are


def quantization_config(args: argparse.Namespace) -> Any:
    """The config of `--quantize`, or None.

    Raises:
        ValueError: The method is unknown or calibrates, or a field is none of its config.
    """
    if args.quantize is None:
        if args.quantize_set:
            raise ValueError("--quantize-set needs --quantize METHOD")
        return None
    if args.quantize in _CALIBRATED:
        raise ValueError(
            f"--quantize {args.quantize}: it calibrates, and the adapter needs its very base again. Run hf-efficiency "
            f"quantize {args.model} --method {args.quantize} --output BASE, then hf-efficiency finetune BASE"
        )
    if args.quantize not in _BASES:
        raise ValueError(f"--quantize {args.quantize}: choose one of {', '.join(QUANTIZERS)}")
    config = getattr(hf_efficiency, _BASES[args.quantize])
    known = {f.name for f in dataclasses.fields(config)} - _NOT_FOR_ROUNDING
    fields = dict(parse_assignment(text) for text in args.quantize_set)
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"--quantize-set {unknown[0]}: {args.quantize} has no such field; it has "
                         f"{', '.join(sorted(known))}")  # fmt: skip
    return config(**fields)


def peft_config(args: argparse.Namespace) -> PeftConfig:
    """The config of `--peft`.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: The type or a field is unknown, or a value is refused.
    """
    config, given = _type_named(args.peft)
    fields = {f.name for f in dataclasses.fields(config)}
    for option, value, names in (("--r", args.r, _RANKS), ("--alpha", args.alpha, _ALPHAS)):
        if value is not None:
            given[_first(names, fields, option, args.peft)] = value
    if "target_r" in given:  # AdaLoRA begins above its budget, by half as the paper does
        given["init_r"] = max(given["target_r"] + 1, round(1.5 * given["target_r"]))
    if args.targets is not None:
        targets = [name.strip() for name in args.targets.split(",") if name.strip()]
        given[_first(("target_modules",), fields, "--targets", args.peft)] = (
            "all-linear" if targets == ["all-linear"] else targets
        )
    elif "target_modules" in fields and args.peft not in _OWN_TARGETS:
        given["target_modules"] = "all-linear"
    for assignment in args.set:
        name, value = parse_assignment(assignment)
        if name not in fields - _RESERVED:
            near = difflib.get_close_matches(name, fields - _RESERVED)
            hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(sorted(fields - _RESERVED))}"
            raise ValueError(f"--set {name}: the type {args.peft} has no such field; {hint}")
        given[name] = value
    if "num_virtual_tokens" in fields:
        given.setdefault("num_virtual_tokens", _VIRTUAL_TOKENS)
    if args.peft == "adalora":
        given.setdefault("total_step", _UNKNOWN_YET)
    return config(task_type="CAUSAL_LM", **given)


def _type_named(name: str) -> tuple[Any, dict[str, Any]]:
    try:
        mapping = importlib.import_module("peft.mapping")
    except ImportError as error:
        raise ImportError("finetune needs PEFT and TRL: pip install 'hf_efficiency[peft,trl]'") from error
    importlib.import_module("hf_efficiency.integrations.peft")  # enters our types into PEFT's tables
    kind, extra = _VARIANTS.get(name, (name, {}))
    types = {str(key.value).lower(): config for key, config in mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = kind.replace("-", "_")
    if f"{kind}_tuning" in types:  # prefix, prompt
        kind = f"{kind}_tuning"
    if kind not in types:
        near = difflib.get_close_matches(kind, types)
        hint = f"did you mean {', '.join(near)}?" if near else f"choose one of {', '.join(sorted(types))}"
        raise ValueError(f"--peft {name}: no such type; {hint}")
    return types[kind], dict(extra)


def _first(names: tuple[str, ...], fields: set[str], option: str, kind: str) -> str:
    found = next((name for name in names if name in fields), None)
    if found is None:
        raise ValueError(f"{option}: the type {kind} has no such option; its fields are set by --set")
    return found


def checkpoints(args: argparse.Namespace, config: PeftConfig) -> bool:
    """Whether to recompute activations.

    Raises:
        ValueError: It was asked for, and the type can't.
    """
    can = not config.is_prompt_learning or str(config.peft_type) not in ("PREFIX_TUNING", "PeftType.PREFIX_TUNING")
    if args.gradient_checkpointing and not can:
        raise ValueError(f"--gradient-checkpointing: {args.peft} keeps its prefix in the cache, which it leaves empty")
    return can if args.gradient_checkpointing is None else bool(args.gradient_checkpointing)


def packs(args: argparse.Namespace, config: PeftConfig) -> bool:
    """Whether to fill sequences with several rows.

    Raises:
        ValueError: It was asked for, and the type can't.
    """
    if args.packing and config.is_prompt_learning:
        raise ValueError(f"--packing: {args.peft} puts its tokens before each sequence, not before each row in it")
    return not config.is_prompt_learning if args.packing is None else bool(args.packing)


def optimizer_name(args: argparse.Namespace) -> str:
    """The optimizer that `--optimizer` names.

    Raises:
        ValueError: It was named, and the type brings its own.
    """
    if args.peft == "galore" and args.optimizer is not None:
        raise ValueError(f"--optimizer {args.optimizer}: the type galore brings its own (--set variant=galore-8bit)")
    return args.optimizer or "adamw"


def callbacks(args: argparse.Namespace) -> list[TrainerCallback]:
    """What the type needs while it trains."""
    name = _CALLBACKS.get(args.peft)
    return [] if name is None else [getattr(hf_efficiency, name)()]


def parameters(model: PeftModel) -> tuple[int, int]:
    """(trainable parameters, weights that the whole model stands for)."""
    trainable, total = model.get_nb_trainable_parameters()
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    return int(trainable), int(total + packed)
