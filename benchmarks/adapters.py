"""Adapters on a 4-bit base: held-out perplexity before and after, and what training them takes.

    PYTHONPATH=. python benchmarks/adapters.py --text tinyshakespeare.txt --output benchmarks/results/adapters.md

SmolLM2-135M with its linear layers in NF4 (double quantization), float32 activations, one thread. Data as in
`galore.py`, whose rows train all weights: one window of 256 tokens a step, in the order of the text; held out: the
first six windows of the last 10,240 characters. AdamW without weight decay, a constant learning rate that suits the
type, seed 0. Each row runs in a process of its own. CPU seconds are those of the training steps alone; the peak memory
is that of the whole process, its libraries included.
"""

import argparse
import importlib
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_efficiency
from hf_efficiency.demo import demo_model_path
from hf_efficiency.evaluation import peak_memory

WINDOW = 256
HELD_OUT_WINDOWS = 6
HELD_OUT_CHARACTERS = 40 * WINDOW
EARLY = 20  # steps of `galore.py`


@dataclass(frozen=True)
class Row:
    """One line of the table: a config of PEFT or of ours, and the learning rate."""

    label: str
    config: str
    learning_rate: float
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """The config; a name with a dot says its module."""
        module, _, name = self.config.rpartition(".")
        config = getattr(importlib.import_module(module), name)
        return config(task_type="CAUSAL_LM", **self.arguments)


_ALL = {"target_modules": "all-linear"}
_LORA = {"r": 8, "lora_alpha": 16, **_ALL}
ROWS = {
    "lora": Row("LoRA r=8", "peft.LoraConfig", 1e-3, _LORA),
    "dora": Row("DoRA r=8", "peft.LoraConfig", 1e-3, {**_LORA, "use_dora": True}),
    "vera": Row("VeRA r=256", "peft.VeraConfig", 1e-2, {"r": 256, **_ALL}),
    "dvora": Row("DVoRA r=256", "hf_efficiency.DVoRAConfig", 1e-2, {"r": 256, **_ALL}),
    "bottleneck": Row("bottleneck (Houlsby)", "hf_efficiency.BottleneckConfig", 1e-3),
    "parallel": Row("bottleneck (parallel)", "hf_efficiency.BottleneckConfig", 1e-3, {"variant": "parallel"}),
    "compacter": Row("Compacter n=4", "hf_efficiency.CompacterConfig", 3e-3),
    "snell": Row("SNELL r=16", "hf_efficiency.SNELLConfig", 1e-3, {"r": 16}),
    "bitfit": Row("BitFit, added biases", "hf_efficiency.BitFitConfig", 1e-3, {"add_bias": True}),
    "intrinsic": Row("random subspace d=1000", "hf_efficiency.IntrinsicConfig", 1e-2),
}


def split(tokenizer: Any, text: str, steps: int) -> tuple[Tensor, Tensor]:
    """Training (steps, WINDOW) and held-out (HELD_OUT_WINDOWS, WINDOW) windows, as `galore.py` cuts them."""
    train = tokenizer(text[: steps * WINDOW * 8], return_tensors="pt", verbose=False).input_ids[0]
    held_out = tokenizer(text[-HELD_OUT_CHARACTERS:], return_tensors="pt", verbose=False).input_ids[0]
    return train[: steps * WINDOW].view(steps, WINDOW), held_out[: HELD_OUT_WINDOWS * WINDOW].view(-1, WINDOW)


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood; the first token of a window is only read."""
    model.eval()
    total = 0.0
    for row in windows:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, row[1:], reduction="sum").item()
    return math.exp(total / (windows.numel() - len(windows)))


def run_here(name: str, model_path: str, text: str, steps: int) -> dict[str, Any]:
    """Trains one row in this process."""
    torch.set_num_threads(1)
    row = ROWS[name]
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    train, held_out = split(tokenizer, Path(text).read_text(encoding="utf-8"), steps)
    base = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, quantization_config=hf_efficiency.NF4Config()
    )
    before = perplexity(base, held_out)
    hf_efficiency.prepare_for_training(base, gradient_checkpointing=False)
    torch.manual_seed(0)
    model = get_peft_model(base, row.build())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=row.learning_rate, weight_decay=0.0)
    model.train()
    seconds, losses, early = 0.0, [], None
    for ids in train:
        start = time.process_time()
        loss = model(input_ids=ids[None], labels=ids[None], use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds += time.process_time() - start
        if len(losses) == EARLY:
            early = perplexity(model, held_out)
            model.train()
    memory = peak_memory()
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    return {
        "label": row.label,
        "learning_rate": row.learning_rate,
        "trainable": sum(p.numel() for p in parameters),
        "optimizer_bytes": sum(t.nbytes for t in states),
        "peak_memory": memory,
        "cpu_seconds": seconds / steps,
        "before": before,
        "early": early,
        "after": perplexity(model, held_out),
        "losses": losses,
    }


def run_apart(name: str, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Starts the child; None where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, __file__, "--model", arguments.model, "--text", arguments.text]
        command += ["--steps", str(arguments.steps), "--child", name, "--result", str(result)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode or not result.exists():
            print(f"{name}: failed\n{done.stderr[-1500:]}", flush=True)
            return None
        row: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return row


def table(rows: list[dict[str, Any]], steps: int) -> str:
    """Markdown."""
    lines = [
        "| adapter | learning rate | trainable parameters | optimizer state | peak memory | CPU s a step "
        f"| perplexity before | after {EARLY} steps | after {steps} steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['label']} | {r['learning_rate']:g} | {r['trainable']:,} | {r['optimizer_bytes'] / 1e6:.2f} MB "
        f"| {r['peak_memory'] / 1e6:.0f} MB | {r['cpu_seconds']:.2f} | {r['before']:.2f} | {_number(r['early'])} "
        f"| {r['after']:.2f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder of the dense checkpoint (default: SmolLM2-135M)")
    parser.add_argument("--text", required=True, help="UTF-8 text file")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", default=",".join(ROWS), help="comma-separated rows")
    parser.add_argument("--output", type=Path, help="file for the table, rewritten after each row")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.model = arguments.model or demo_model_path()
    if arguments.child:
        row = run_here(arguments.child, arguments.model, arguments.text, arguments.steps)
        Path(arguments.result).write_text(json.dumps(row), encoding="utf-8")
        return 0
    unknown = [name for name in arguments.only.split(",") if name not in ROWS]
    if unknown:
        parser.error(f"--only {', '.join(unknown)}: choose from {', '.join(ROWS)}")
    rows: list[dict[str, Any]] = []
    for name in arguments.only.split(","):
        row = run_apart(name, arguments)
        if row is not None:
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if k != "losses"}), flush=True)
            if arguments.output:
                arguments.output.write_text(table(rows, arguments.steps), encoding="utf-8")
    print(table(rows, arguments.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
