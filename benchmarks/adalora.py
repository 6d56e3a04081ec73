"""LoRA-like PEFT types on SmolLM2-135M through a plain `Trainer`: held-out perplexity, ranks left, bytes on disk.

    PYTHONPATH=. python benchmarks/adalora.py --text FILE --output benchmarks/results/adalora.md

Each row trains one adapter on all linear layers for a few steps on the same text and seed, on one thread.
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.adalora.layer import AdaLoraLayer
from transformers import Trainer, TrainingArguments

from hf_efficiency import (
    AdaDoRAConfig,
    AdaLoRACallback,
    DVoRAConfig,
    DyLoRAConfig,
    SoRACallback,
    SoRAConfig,
    load_demo_model,
)
from hf_efficiency.adapters.sora import SoRA
from hf_efficiency.adapters.triplet import Triplet
from hf_efficiency.integrations.peft.base import AdapterLinear

COMMON = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
RANK = {"r": 8, "lora_alpha": 16, **COMMON}


def _budget(args: argparse.Namespace) -> dict[str, Any]:
    """Ranks 12 to a mean of 8, reduced between a fifth and four fifths of the training."""
    return {
        "init_r": 12,
        "target_r": 8,
        "tinit": args.steps // 5,
        "tfinal": args.steps // 5,
        "lora_alpha": 32,
        **COMMON,
    }


def _adalora(args: argparse.Namespace) -> AdaLoraConfig:
    return AdaLoraConfig(total_step=args.steps, **_budget(args))


# name: (label, config, callbacks, learning rate as a multiple)
ROWS = {
    "lora": ("LoRA (PEFT)", lambda args: LoraConfig(**RANK), list, 1),
    "adalora-bare": ("AdaLoRA (PEFT), no callback", _adalora, list, 5),
    "adalora": ("AdaLoRA, `AdaLoRACallback`", _adalora, lambda: [AdaLoRACallback()], 5),
    "gradient-norm": ("AdaLoRA, gradient norm", _adalora, lambda: [AdaLoRACallback("gradient_norm")], 5),
    "adadora": ("AdaDoRA", lambda args: AdaDoRAConfig(**_budget(args)), lambda: [AdaLoRACallback()], 5),
    "sora": ("SoRA", lambda args: SoRAConfig(sparse_lambda=args.sparse_lambda, **RANK), lambda: [SoRACallback()], 1),
    "dylora": ("DyLoRA", lambda args: DyLoRAConfig(**RANK), list, 1),
    "dvora": ("DVoRA, r = 64", lambda args: DVoRAConfig(r=64, **COMMON), list, 5),
}


def ranks(model: torch.nn.Module) -> list[int]:
    """The rank of each matrix that has one to reduce."""
    found = []
    for module in model.modules():
        if isinstance(module, AdaLoraLayer):
            found += [int((e != 0).sum()) for e in module.lora_E.values()]
        elif isinstance(module, AdapterLinear):
            for adapter in module.adapters.values():
                if isinstance(adapter, Triplet):
                    e = adapter.e
                    found.append(int((e != 0).sum()) if isinstance(adapter, SoRA) else e.numel())
    return found


def measure(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains one row; a dict of what was measured."""
    _, config, callbacks, rate = ROWS[row]
    base, tokenizer = load_demo_model(dtype=torch.float32)
    text = Path(args.text).read_text(encoding="utf-8")
    rows, length = args.steps * args.batch_size, args.length
    ids = tokenizer(text[: rows * length * 8], return_tensors="pt").input_ids[0][: rows * length].view(rows, length)
    held_out = tokenizer(text[-length * 100 :], return_tensors="pt").input_ids[0][: 16 * length].view(4, 4, length)
    base.config.use_cache = False
    torch.manual_seed(0)
    model = get_peft_model(base, config(args))
    trained, first = sum(p.numel() for p in model.parameters() if p.requires_grad), ranks(model)

    @torch.no_grad()
    def perplexity() -> float:
        model.eval()
        core = model.get_base_model()  # without the term that PEFT's AdaLoRA adds to the loss
        return float(torch.stack([core(x, labels=x).loss for x in held_out]).mean().exp())

    before = perplexity()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=args.batch_size, learning_rate=rate * args.lr,
            warmup_steps=2, report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(
            model, settings, train_dataset=[{"input_ids": x, "labels": x} for x in ids], callbacks=callbacks()
        )
        start = time.process_time()
        trainer.train()
        seconds = (time.process_time() - start) / args.steps
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    result = {"trained": trained, "before": before, "after": perplexity(), "first": first, "ranks": ranks(model)}
    if row == "dylora":
        result["smaller"] = {}
        for k in (1, 2, 4):
            model.set_rank(k)
            result["smaller"][k] = perplexity()
    return {**result, "seconds": seconds, "size": size}


def line(row: str, result: dict[str, Any]) -> str:
    """One row of the table."""
    first, last = result["first"], result["ranks"]
    pruned = sum(a < max(first) for a in last)
    left = f"{sum(last)} of {sum(first)} | {pruned} of {len(last)}" if last and sum(first) else "– | –"
    if not any(first):  # AdaLoRA's e starts at zero
        left = f"{sum(last)} of {12 * len(last)} | {sum(a < 12 for a in last)} of {len(last)}" if last else "– | –"
    label = ROWS[row][0] + "".join(f"; at rank {k} {p:.2f}" for k, p in result.get("smaller", {}).items())
    return (
        f"| {label} | {result['trained']:,} | {result['after']:.2f} | {left} | {result['size'] / 2**20:.2f} "
        f"| {result['seconds']:.1f} |"
    )


def main() -> None:
    """Runs the rows one after another and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="text to train on; its end is held out")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--sparse-lambda", type=float, default=10.0)
    parser.add_argument("--output", help="Markdown file; printed otherwise")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {row: measure(row, args) for row in args.rows}
    before = next(iter(results.values()))["before"]
    given = {k: v for k, v in vars(args).items() if v != parser.get_default(k) and k not in ("output", "text")}
    options = "".join(f" --{k.replace('_', '-')} {' '.join(v) if isinstance(v, list) else v}" for k, v in given.items())
    page = [
        "# LoRA-like PEFT types on SmolLM2-135M", "",
        f"Command: `PYTHONPATH=. python benchmarks/adalora.py --text {Path(args.text).name}{options}`", "",
        f"Machine: {platform.machine()}, one thread, float32. {args.steps} steps of {args.batch_size} x {args.length} "
        f"tokens through `Trainer`, AdamW, learning rate {args.lr} ({5 * args.lr} for DVoRA, and for "
        "AdaLoRA and AdaDoRA, whose singular values start at zero). Perplexity on "
        f"the end of the same file, before training {before:.2f}. Seconds are CPU seconds of a step.", "",
        "| type | trained numbers | held-out perplexity | directions left | matrices pruned | saved, MiB | step, s |",
        "|---|---|---|---|---|---|---|", *(line(row, result) for row, result in results.items()), "",
    ]  # fmt: skip
    if args.output:
        Path(args.output).write_text("\n".join(page))
    else:
        print("\n".join(page))


if __name__ == "__main__":
    main()
