"""The report of a selection: a page, and one picture of scores and lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from hf_efficiency.selection import Selection

_POOL, _CHOSEN = "#9aa0a6", "#1f6feb"
_BINS = 60


def draw(selection: Selection, lengths: np.ndarray, path: Path) -> None:
    """Writes a PNG: the scores of the pool and of what was chosen (for duplicates the sizes of groups), and lengths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    scores, chosen = np.asarray(selection.scores, np.float64), selection.indices
    if "duplicates" in selection.report:
        sizes = np.bincount(np.bincount(scores.astype(np.int64))[chosen])
        left.bar(np.arange(1, len(sizes)), sizes[1:], color=_CHOSEN)
        left.set(title="Texts in a group of duplicates", xlabel="texts", ylabel="groups", yscale="log")
    else:
        finite = np.isfinite(scores)
        _histogram(left, scores[finite], scores[chosen[finite[chosen]]])
        left.set(title=f"Score ({selection.report['strategy']})", ylabel="rows")
    _histogram(right, np.log10(np.maximum(lengths, 1)), np.log10(np.maximum(lengths[chosen], 1)))
    right.set(title="Characters of a text", xlabel="log10")
    for axis in (left, right):
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.suptitle(f"{len(chosen):,} of {len(scores):,} rows", fontsize=10)
    figure.savefig(path, format="png")


def _histogram(axis: Any, pool: np.ndarray, chosen: np.ndarray) -> None:
    low, high = (float(pool.min()), float(pool.max())) if len(pool) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    axis.hist(pool, edges, color=_POOL, label="pool")
    axis.hist(chosen, edges, color=_CHOSEN, label="chosen")
    axis.legend(loc="upper right", frameon=False, fontsize=8)


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    characters = report["characters"]
    rows = [
        ("Rows of the pool", f"{report['pool']:,}"),
        ("Rows chosen", f"{report['chosen']:,} ({100 * report['chosen'] / report['pool']:.1f} %)"),
        ("Characters of the pool", f"{characters['pool']:,}"),
        ("Characters chosen", f"{characters['chosen']:,}"),
    ]
    if "duplicates" in report:
        rows += [
            ("Duplicates removed", f"{report['duplicates']:,}"),
            ("Largest group", f"{report['largest_cluster']:,}"),
        ]
    if report.get("unscored"):
        rows.append(("Rows without a score", f"{report['unscored']:,}"))
    rows += [(f"Rule broken: {name}", f"{count:,}") for name, count in report.get("broken_rules", {}).items()]
    lines = [
        f"# Training data chosen by {report['strategy']}",
        "",
        f"    {report['command']}",
        "",
        "![](report.png)",
        "",
    ]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    if report.get("quantiles") and "duplicates" not in report:
        lines += ["| score at quantile | pool | chosen |", "|---|---|---|"]
        chosen = report["quantiles_chosen"]
        lines += [
            f"| {at} | {value:.4g} | {chosen.get(at, float('nan')):.4g} |" for at, value in report["quantiles"].items()
        ]
        lines.append("")
    settings = ", ".join(f"{name}={value}" for name, value in report["settings"].items()) or "none"
    lines += [f"Settings: {settings}; seed {report['seed']}.", ""]
    lines += ["`subset.jsonl` has the rows, `scores.safetensors` the scores of all rows and the chosen indices.", ""]
    return "\n".join(lines)
