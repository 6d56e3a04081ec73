"""Every kernel on this machine's GPU: correct first, then timed beside what it competes with.

    PYTHONPATH=. python benchmarks/gpu.py --output benchmarks/results/gpu.md
    PYTHONPATH=. python benchmarks/gpu.py --only quant_linear,hadamard --seconds 0.2

It needs torch, Triton and a checkout, nothing else. Times are medians of device events, each over one run; the inputs
rotate through several copies, together larger than the last cache, so that none is found there. Every competitor of a
case runs in the same process, in turn. The percentage is the floor of `costs.py` over the time.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from costs import floor
from kernel_case import Case, Run, cases_of, projects
from torch import Tensor

_CACHE = 128 << 20  # bytes: more than twice the last cache of an H100
_MOST_COPIES = 64
_WARM_UP = 5
_FEWEST, _MOST = 20, 400  # timed runs


def difference(actual: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest magnitude expected; of several results the worst."""
    if isinstance(actual, Tensor) or isinstance(expected, Tensor):
        actual, expected = (actual,), (expected,)  # type: ignore[assignment]
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            return float("inf")
        scale = e.double().abs().max().clamp(min=1e-30)
        error = ((a.double() - e.double()).abs().max() / scale).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


def seconds(runs: Sequence[Run], budget: float) -> float:
    """Median seconds of one run, the copies taking turns, over about `budget` seconds."""
    for i in range(_WARM_UP):
        runs[i % len(runs)]()
    torch.cuda.synchronize()
    probe = _time(runs, _FEWEST)
    count = max(_FEWEST, min(_MOST, int(budget / max(statistics.median(probe), 1e-6))))
    return statistics.median(_time(runs, count))


def _time(runs: Sequence[Run], count: int) -> list[float]:
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for i, (start, stop) in enumerate(marks):
        start.record()
        runs[i % len(runs)]()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in marks]


def peak_bytes(run: Run) -> int:
    """Memory that a run takes beyond what is held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(case: Case, device: torch.device, budget: float) -> dict[str, Any]:
    """One row: the error, and for each competitor its time and peak memory."""
    once = case.make(device, 0)
    row: dict[str, Any] = {"case": case.label, "bytes": case.bytes, "flops": case.flops, "floor": floor(case)}
    row |= {"error": difference(once["kernel"](), once["reference"]()), "tolerance": case.tolerance, "goal": case.goal}
    del once
    copies = max(1, min(_MOST_COPIES, -(-_CACHE // max(case.bytes, 1))))
    made = [case.make(device, seed) for seed in range(copies)]
    row["seconds"], row["peak"] = {}, {}
    for name in made[0]:
        try:
            row["peak"][name] = peak_bytes(made[0][name])
            row["seconds"][name] = seconds([copy[name] for copy in made], budget)
        except torch.OutOfMemoryError:
            row["seconds"][name] = None
    torch.cuda.empty_cache()
    return row


def table(project: str, rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    others = [name for name in names if name != "kernel"]
    head = ["case", "error", "kernel, µs", "of the floor", "peak, MB", *(f"{name}, µs (speed-up)" for name in others)]
    lines = [f"## {project}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        own = row["seconds"].get("kernel")
        if own is None:
            lines.append(f"| {row['case']} | {row.get('failure', 'out of memory')} |" + " |" * (len(head) - 2))
            continue
        wrong = "" if row["error"] <= row["tolerance"] else " **wrong**"
        cells = [row["case"], f"{row['error']:.1e}{wrong}", f"{own * 1e6:,.1f}", f"{row['floor'] / own:.0%}"]
        cells.append(f"{row['peak']['kernel'] / 1e6:,.1f}")
        for name in others:
            other = row["seconds"].get(name)
            cells.append("out of memory" if other is None else f"{other * 1e6:,.1f} ({other / own:.2f}×)")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measures and prints; 1 where a result is wrong or a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma-separated projects, such as quant_linear,hadamard")
    parser.add_argument("--seconds", type=float, default=0.1, help="time for each competitor of a case (%(default)s)")
    parser.add_argument("--output", type=Path, help="Markdown file; rewritten after each project, .json beside it")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    device = torch.device("cuda")
    chosen = [f for f in projects() if args.only is None or f.name in args.only.split(",")]
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, {torch.cuda.get_device_name(device)}"
    text, results, wrong = f"# Kernels on a GPU\n\n{versions}\n\n    {' '.join(['python', *sys.argv])}\n", {}, False
    for folder in chosen:
        rows = []
        for case in cases_of(folder):
            try:
                rows.append(measure(case, device, args.seconds))
            except Exception as error:  # noqa: BLE001  # one broken case must not cost the others' results
                rows.append({"case": case.label, "failure": f"{type(error).__name__}: {error}"[:300], "seconds": {}})
            row = rows[-1]
            wrong |= "failure" in row or row["error"] > row["tolerance"]
            print(json.dumps(row), flush=True)
        results[folder.name] = rows
        text += "\n" + table(folder.name.replace("_", "-"), rows)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(text, encoding="utf-8")
            args.output.with_suffix(".json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(text)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
