"""`hf-efficiency bench-generate MODEL FILE`: settings side by side on the user's own prompts."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_efficiency.cli.generation import Drafts, Setting, encode, pad_token, read_setting
from hf_efficiency.cli.models import load_model, load_tokenizer, resolve
from hf_efficiency.evaluation import read_text
from hf_efficiency.evaluation.metrics import GREEDY, evaluating
from hf_efficiency.evaluation.report import size

if TYPE_CHECKING:
    import argparse


@dataclass(frozen=True)
class Measured:
    """One setting over all prompts.

    Attributes:
        name: As typed.
        tokens_per_second: New tokens by seconds in `generate`, prompts included.
        speedup: Of the plain setting's seconds a token.
        cache_bytes: Largest key-value cache at a text's end.
        agreement: Mean share of the plain text that is the same from its beginning on.
        identical: Share of texts that are the plain ones.
        acceptance, tokens_per_forward: Of drafts; None without.
    """

    name: str
    tokens_per_second: float
    speedup: float
    cache_bytes: int
    agreement: float
    identical: float
    acceptance: float | None = None
    tokens_per_forward: float | None = None


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1")
    if not args.setting:
        raise ValueError("give at least one --setting, such as --setting 'draft=lookup'")
    settings = {"plain": Setting(), **{text: read_setting(text) for text in args.setting}}
    prompts = read_prompts(args.prompts)
    with resolve(args.model) as source:
        tokenizer = load_tokenizer(source)
        inputs = [encode(tokenizer, prompt, raw=args.raw) for prompt in prompts]
        model = load_model(source.path, args.dtype, args.device)
        with Drafts(tokenizer, args.dtype, args.device) as drafts, evaluating(model):
            for setting in settings.values():
                drafts.arguments(setting, model)  # errors come before any measuring
            measured = _measure(model, tokenizer, drafts, settings, inputs, args.max_new_tokens)
    print(table(measured))
    print(f"\n{len(prompts)} prompts, up to {args.max_new_tokens} new tokens each, {model.dtype}, {model.device}")
    if args.json:
        content = {"model": args.model, "prompts": len(prompts), "settings": [dataclasses.asdict(m) for m in measured]}
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        draw(measured, args.plot)
    return 0


def read_prompts(path: str) -> list[str]:
    """A prompt from each line that isn't empty.

    Raises:
        ValueError: The file can't be read, or a line of a .jsonl file has no field 'prompt'.
    """
    lines = [line for line in read_text(path).text.splitlines() if line.strip()]
    if Path(path).suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {path!r} is no JSON object with a field 'prompt'") from error
    return prompts


def _measure(
    model: Any, tokenizer: Any, drafts: Drafts, settings: dict[str, Setting], inputs: list[Any], new_tokens: int
) -> list[Measured]:
    pad = pad_token(model, tokenizer)
    texts: dict[str, list[list[int]]] = {}
    found: list[Measured] = []
    for name, setting in settings.items():
        texts[name], seconds, held = [], 0.0, 0
        counts = {"drafted": 0, "accepted": 0, "tokens": 0, "forwards": 0}
        for number, one in enumerate(inputs):
            ids = {key: tensor.to(model.device) for key, tensor in one.items()}
            for warm in (True, False) if number == 0 else (False,):
                extra = drafts.arguments(setting, model)
                limit = min(4, new_tokens) if warm else new_tokens
                began = _now(model.device)
                out = model.generate(
                    **ids, max_new_tokens=limit, pad_token_id=pad, return_dict_in_generate=True, **GREEDY, **extra
                )
                taken = _now(model.device) - began
            seconds += taken
            texts[name].append(out.sequences[0, ids["input_ids"].shape[1] :].tolist())
            held = max(held, cache_bytes(out.past_key_values))
            if setting.draft is not None:
                statistics = extra["custom_generate"].statistics
                counts["drafted"] += sum(statistics.drafted)
                counts["accepted"] += sum(statistics.accepted)
                counts["tokens"] += statistics.tokens
                counts["forwards"] += statistics.target_forwards
        speed = sum(map(len, texts[name])) / seconds
        pairs = list(zip(texts[name], texts["plain"], strict=True))
        found.append(
            Measured(
                name,
                speed,
                speed / found[0].tokens_per_second if found else 1.0,
                held,
                sum(agreement(text, plain) for text, plain in pairs) / len(pairs),
                sum(text == plain for text, plain in pairs) / len(pairs),
                counts["accepted"] / max(1, counts["drafted"]) if setting.draft is not None else None,
                counts["tokens"] / max(1, counts["forwards"]) if setting.draft is not None else None,
            )
        )
    return found


def agreement(text: list[int], plain: list[int]) -> float:
    """The share of two texts, as long as the longer one, that is the same from the beginning on."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, plain, strict=False)))
    return same / max(1, len(text), len(plain))


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache's tensors hold."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes())
    tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()


def table(measured: list[Measured]) -> str:
    """The comparison in columns."""
    width = max(len("setting"), *(len(m.name) for m in measured))
    heads = ("tokens/s", "speedup", "cache", "agreement", "identical", "acceptance", "tokens/forward")
    lines = [f"{'setting':<{width}}" + "".join(f"{head:>15}" for head in heads)]
    for m in measured:
        cells = (
            f"{m.tokens_per_second:.1f}", f"{m.speedup:.2f}x", size(m.cache_bytes), f"{100 * m.agreement:.0f} %",
            f"{100 * m.identical:.0f} %", "-" if m.acceptance is None else f"{m.acceptance:.2f}",
            "-" if m.tokens_per_forward is None else f"{m.tokens_per_forward:.2f}",
        )  # fmt: skip
        lines.append(f"{m.name:<{width}}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def draw(measured: list[Measured], path: str) -> None:
    """A PNG with a bar for each setting: speed, memory, agreement.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        # not pyplot: it would pick a display and keep the figure in a global list
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from error
    panels = (
        ("Tokens/s", [m.tokens_per_second for m in measured], [f"{m.tokens_per_second:.1f}" for m in measured]),
        ("Key-value cache", [float(m.cache_bytes) for m in measured], [size(m.cache_bytes) for m in measured]),
        ("Agreement with plain", [m.agreement for m in measured], [f"{100 * m.agreement:.0f} %" for m in measured]),
    )
    figure = Figure(figsize=(10, 0.5 * len(measured) + 1.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, values, labels) in zip(axes, panels, strict=True):
        colors = ["#9aa0a6", *["#1f6feb"] * (len(measured) - 1)]
        bars = axis.barh([m.name for m in measured], values, color=colors)
        axis.bar_label(bars, labels=labels, fontsize=8, padding=2)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, 1.3 * max(*values, 1e-12))
        axis.set_xticks([])
    axes[0].invert_yaxis()
    figure.savefig(Path(path), format="png")
