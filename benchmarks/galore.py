"""GaLore on SmolLM2-135M: loss, step time, optimizer bytes and peak memory, beside galore-torch and dense AdamW.

    PYTHONPATH=. python benchmarks/galore.py --text FILE --peer FOLDER --output benchmarks/results/galore.md

Each row trains all weights for a few steps on the same text in a process of its own, on one thread. `--peer` is a
folder with the package `galore_torch`; without it its row is left out. Seconds are CPU seconds of `optimizer.step()`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

RANK = 64
# name: (label, arguments of `galore`)
ROWS = {
    "adamw": ("torch AdamW, dense", None),
    "galore-torch": ("galore-torch", None),
    "svd": ("GaLore, full SVD", {"projection": "svd"}),
    "power": ("GaLore, power step (default)", {}),
    "randomized": ("GaLore, randomized SVD", {"projection": "randomized"}),
    "embeddings": ("GaLore, embeddings too", {"embeddings": True}),
    "8bit": ("GaLore, 8-bit states", {"variant": "galore-8bit"}),
    "q-galore": ("Q-GaLore, int4 projection", {"variant": "q-galore", "lazy_patience": 1}),
    "apollo": ("APOLLO", {"variant": "apollo"}),
    "per-layer": ("GaLore, per-layer update", {"per_layer": True}),
}


def build(row: str, model: Any, args: argparse.Namespace) -> Any:
    """The optimizer of a row."""
    import torch

    from hf_efficiency.integrations.transformers.galore import galore, galore_param_groups
    from hf_efficiency.optim import variant_options

    if row == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    common = {"rank": RANK, "update_proj_gap": args.gap, "scale": args.scale}
    if row == "galore-torch":
        from galore_torch import GaLoreAdamW as Peer

        options = variant_options("galore", rank=RANK)
        groups = galore_param_groups(model, options={"rank": RANK, "state_bits": options.state_bits})
        low, *rest = [[p for _, p in group["params"]] for group in groups]
        return Peer(
            [{"params": low, **common, "proj_type": "std"}, {"params": list(chain(*rest))}],
            lr=args.lr, eps=1e-8, no_deprecation_warning=True,
        )  # fmt: skip
    factory, settings = galore(model, lr=args.lr, **{**common, **ROWS[row][1]})
    return factory()(model, **settings)


def peak_megabytes(reset: bool = False) -> float:
    """Of resident memory since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains one row; a dict of what was measured."""
    import torch

    from hf_efficiency.demo import load_demo_model
    from hf_efficiency.optim import GaLoreAdamW, formula_bytes, optimizer_bytes

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokenizer = load_demo_model(dtype=torch.float32)
    text = Path(args.text).read_text(encoding="utf-8")
    ids = tokenizer(text[: args.steps * args.length * 8], return_tensors="pt").input_ids[0]
    held_out = tokenizer(text[-args.length * 40 :], return_tensors="pt").input_ids[0]
    batches = ids[: args.steps * args.length].view(args.steps, 1, args.length)
    windows = held_out[: 6 * args.length].view(6, 1, args.length)
    model.config.use_cache = False

    @torch.no_grad()
    def perplexity() -> float:
        model.eval()
        losses = [model(x, labels=x).loss.item() for x in windows]
        model.train()
        return float(torch.tensor(losses).mean().exp())

    before = perplexity()
    optimizer = build(row, model, args)
    peak_megabytes(reset=True)
    losses, seconds = [], []
    start = time.process_time()
    for x in batches:
        loss = model(x, labels=x).loss
        losses.append(loss.item())
        loss.backward()
        tick = time.process_time()
        optimizer.step()
        seconds.append(time.process_time() - tick)
        optimizer.zero_grad()
    total, peak = time.process_time() - start, peak_megabytes()
    refreshes = range(0, args.steps, args.gap)
    ours = isinstance(optimizer, GaLoreAdamW)
    return {
        "losses": losses,
        "before": before,
        "after": perplexity(),
        "first": seconds[0],
        "refresh": statistics.mean(seconds[i] for i in refreshes if i),
        "step": statistics.median(s for i, s in enumerate(seconds) if i not in refreshes and i > 1),
        "total": total,
        "bytes": optimizer_bytes(optimizer),
        "formula": formula_bytes(optimizer.param_groups) if ours else None,
        "peak": peak,
    }


def page(results: dict[str, dict[str, Any]], args: list[tuple[str, Any]]) -> str:
    """The results as Markdown."""
    base = results.get("galore-torch", {}).get("losses")
    any_row = next(iter(results.values()))
    command = " ".join(["PYTHONPATH=. python benchmarks/galore.py", *(f"--{n} {v}" for n, v in args)])
    lines = [
        "# GaLore on SmolLM2-135M", "", f"Command: `{command}`", "",
        f"Machine: {platform.machine()}, {cpu_name()}, one thread, other work beside it; float32, rank {RANK}. Seconds "
        "of `optimizer.step()` are CPU seconds; sizes are MiB; the peak is of the whole process while it trains. The "
        "loss is the mean of the last five steps; then its distance to galore-torch's, and the largest distance of any "
        f"step. The held-out end of the file had perplexity {any_row['before']:.2f} before training.", "",
        "| row | loss | to galore-torch, % | held-out perplexity | step, s | first, s | refresh, s | held | formula "
        "| peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, r in results.items():
        last = statistics.mean(r["losses"][-5:])
        if base is None or name in ("adamw", "galore-torch"):
            apart = "–"
        else:
            worst = max((abs(a / b - 1) for a, b in zip(r["losses"], base, strict=True)), default=0)
            apart = f"{100 * (last / statistics.mean(base[-5:]) - 1):+.2f}, {100 * worst:.2f}"
        formula = f"{r['formula'] / 2**20:.1f}" if r["formula"] is not None else "–"
        times = [r["step"], r["first"], r["refresh"]]
        times = ["in backward"] * 3 if name == "per-layer" else [f"{t:.2f}" for t in times]
        lines.append(
            f"| {ROWS[name][0]} | {last:.4f} | {apart} | {r['after']:.2f} | {' | '.join(times)} "
            f"| {r['bytes'] / 2**20:.1f} | {formula} | {r['peak']:.0f} |"
        )
    lines += ["", "Losses of every second step:", ""]
    lines += [f"- {ROWS[name][0]}: " + ", ".join(f"{x:.3f}" for x in r["losses"][::2]) for name, r in results.items()]
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    """As the kernel calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def main() -> int:
    """Runs the rows one after another, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="text to train on")
    parser.add_argument("--peer", help="folder with the package galore_torch")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=256, help="tokens of a step")
    parser.add_argument("--gap", type=int, default=10, help="steps between refreshes of the subspace")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--cache", help="JSON file that keeps finished rows")
    parser.add_argument("--output", help="Markdown file")
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return 0
    cache = Path(args.cache) if args.cache else None
    results = json.loads(cache.read_text()) if cache and cache.exists() else {}
    for row in args.rows:
        if row in results or (row == "galore-torch" and not args.peer):
            continue
        path = os.pathsep.join(filter(None, [args.peer, os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", row],
            env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=True, text=True,
        )  # fmt: skip
        results[row] = json.loads(done.stdout.splitlines()[-1])
        print(row, {k: v for k, v in results[row].items() if k != "losses"}, flush=True)
        if cache:
            cache.write_text(json.dumps(results))
    shown = [(n, getattr(args, n)) for n in ("steps", "length", "gap", "lr", "scale")]
    table = page({row: results[row] for row in ROWS if row in results}, [("text", "FILE"), ("peer", "FOLDER"), *shown])
    print(table)
    if args.output:
        Path(args.output).write_text(table, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
