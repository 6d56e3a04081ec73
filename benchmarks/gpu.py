"""Every kernel on this machine's GPU: correct first, then timed beside what it competes with.

    PYTHONPATH=. python benchmarks/gpu.py --output benchmarks/results/gpu.md
    PYTHONPATH=. python benchmarks/gpu.py --only quant_linear,hadamard --seconds 0.2

It needs torch, Triton and a checkout, nothing else; bitsandbytes competes where it is installed, and `torch.compile` of
the reference where a C compiler is. Times are medians of device events, each over one run that was queued before the
device came to it, so that the host's time is no part of them; the inputs rotate through several copies, together larger
than the last cache, so that none is found there. Every competitor of a case runs in the same process, in turn. What
fails, fails alone. The percentage is the floor of `costs.py` over the time.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
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
_BATCH = 50  # runs queued at a time: with their events far fewer than a queue holds
_LONGEST_SLEEP, _CLOCK = 0.2, 2e9  # seconds, and cycles in one


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
    start = time.perf_counter()
    for i in range(_WARM_UP):
        runs[i % len(runs)]()
    host = (time.perf_counter() - start) / _WARM_UP
    torch.cuda.synchronize()
    probe = _time(runs, _FEWEST, host)
    count = max(_FEWEST, min(_MOST, int(budget / max(statistics.median(probe), 1e-6))))
    return statistics.median(_time(runs, count, host))


def _time(runs: Sequence[Run], count: int, host: float) -> list[float]:
    """Seconds on the device of each run. It sleeps while the host, which takes `host` seconds a run, queues a batch."""
    times = []
    for first in range(0, count, _BATCH):
        batch = range(first, min(first + _BATCH, count))
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in batch]
        torch.cuda._sleep(int(min(_LONGEST_SLEEP, 1.5 * host * len(batch) + 1e-3) * _CLOCK))
        for i, (start, stop) in zip(batch, marks, strict=True):
            start.record()
            runs[i % len(runs)]()
            stop.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(stop) / 1e3 for start, stop in marks]
    return times


def peak_bytes(run: Run) -> int:
    """Memory that a run takes beyond what is held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(case: Case, device: torch.device, budget: float, skip: Sequence[str] = ()) -> dict[str, Any]:
    """One row: the error, and for each competitor its time and peak memory."""
    once = case.make(device, 0)
    row: dict[str, Any] = {"case": case.label, "bytes": case.bytes, "flops": case.flops, "floor": floor(case)}
    row |= {"error": difference(once["kernel"](), once["reference"]()), "tolerance": case.tolerance, "goal": case.goal}
    del once
    copies = max(1, min(_MOST_COPIES, -(-_CACHE // max(case.bytes, 1))))
    made = [case.make(device, seed) for seed in range(copies)]
    if "torch.compile" not in skip:
        _add_compiled(made)
    row |= {"seconds": {}, "peak": {}, "failed": {}}
    for name in [name for name in made[0] if name not in skip]:
        try:
            made[0][name]()  # compiles and tunes, whose memory does not count
            row["peak"][name] = peak_bytes(made[0][name])
            row["seconds"][name] = seconds([copy[name] for copy in made], budget)
        except Exception as error:  # noqa: BLE001  # a competitor that does not work here must not cost the case
            row["failed"][name] = f"{type(error).__name__}: {error}"[:300]
            torch.cuda.empty_cache()
    torch.cuda.empty_cache()
    return row


def _add_compiled(made: list[dict[str, Run]]) -> None:
    """`torch.compile` of the reference as a competitor, where that is one function of its inputs: one compilation."""
    plain = made[0]["reference"]
    if "torch.compile" in made[0] or not isinstance(plain, partial):
        return
    torch.compiler.reset()
    compiled = torch.compile(plain.func, dynamic=False)
    for runs in made:
        reference = runs["reference"]
        if isinstance(reference, partial):
            runs["torch.compile"] = partial(compiled, *reference.args, **reference.keywords)


def table(project: str, rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in (*row["seconds"], *row.get("failed", ()))))
    others = [name for name in names if name != "kernel"]
    head = ["case", "error", "kernel, µs", "of the floor", "peak, MB", *(f"{name}, µs (speed-up)" for name in others)]
    head.append("goal")
    lines = [f"## {project}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    notes = []
    for row in rows:
        failed = row.get("failed", {})
        notes += [f"{row['case']}, {name}: {said}" for name, said in failed.items()]
        own = row["seconds"].get("kernel")
        if own is None:
            lines.append(f"| {row['case']} | {row.get('failure', 'failed')} |" + " |" * (len(head) - 2))
            continue
        wrong = "" if row["error"] <= row["tolerance"] else " **wrong**"
        cells = [row["case"], f"{row['error']:.1e}{wrong}", f"{own * 1e6:,.1f}", f"{row['floor'] / own:.0%}"]
        cells.append(f"{row['peak']['kernel'] / 1e6:,.1f}")
        cells += [_competitor(row, name, own) for name in others]
        lines.append("| " + " | ".join([*cells, row["goal"]]) + " |")
    return "\n".join([*lines, *([""] if notes else []), *(f"- {note}" for note in notes)]) + "\n"


def _competitor(row: dict[str, Any], name: str, own: float) -> str:
    """Time, speed-up over it, and its peak memory where that is another."""
    if name not in row["seconds"]:
        return "failed" if name in row["failed"] else ""
    seconds, peak = row["seconds"][name], row["peak"][name]
    memory = "" if peak == row["peak"]["kernel"] else f", {peak / 1e6:,.1f} MB"
    return f"{seconds * 1e6:,.1f} ({seconds / own:.2f}×{memory})"


def _rows(folder: Path, device: torch.device, budget: float, skip: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a project, each printed as soon as it is there."""
    rows = []
    try:
        cases = cases_of(folder)
    except Exception as error:  # noqa: BLE001  # nor one broken project
        cases = []
        rows.append(_failure("its cases", error))
    for case in cases:
        try:
            rows.append(measure(case, device, budget, skip))
        except Exception as error:  # noqa: BLE001  # one broken case must not cost the others' results
            rows.append(_failure(case.label, error))
            torch.cuda.empty_cache()
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _failure(label: str, error: Exception) -> dict[str, Any]:
    return {"case": label, "failure": f"{type(error).__name__}: {error}"[:300].replace("\n", " "), "seconds": {}}


def main() -> int:
    """Measures and prints; 1 where a result is wrong or a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma-separated projects, such as quant_linear,hadamard")
    parser.add_argument("--skip", default="", help="comma-separated competitors; torch.compile takes the longest")
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
        rows = _rows(folder, device, args.seconds, args.skip.split(","))
        wrong |= any("failure" in row or row["failed"].get("kernel") or row["error"] > row["tolerance"] for row in rows)
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
