"""The one picture of a report: what it cost and what it gained, each on its own axis from zero."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from hf_efficiency.evaluation.report import SHARED_PROCESS, number, size

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

    from hf_efficiency.evaluation.report import Report

_COLORS = ("#9aa0a6", "#1f6feb")  # original, compressed


def draw(report: Report, path: str | Path) -> Path:
    """Write a PNG with two bars, original and compressed, for each measured quantity, and return its path.

    Every axis starts at zero and every bar carries its number; a quantity that was not measured on both is left out.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        # not pyplot: it would pick a display and keep the figure in a global list
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing a report needs matplotlib: pip install matplotlib") from error

    panels = [panel for panel in _panels(report) if panel[2] is not None and panel[3] is not None]
    figure = Figure(figsize=(2.3 * len(panels) + 0.4, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, better, before, after, show) in zip(axes, panels, strict=True):
        _bars(axis, title, better, (float(before or 0), float(after or 0)), show)
    figure.suptitle(f"Mean KL to the original {number(report.mean_kl)} nats a token, "
                    f"top-1 agreement {100 * report.top1_agreement:.1f} %", fontsize=10)  # fmt: skip
    figure.savefig(Path(path), format="png")
    return Path(path)


_Panel = tuple[str, str, "float | None", "float | None", "Callable[[float], str]"]


def _panels(report: Report) -> list[_Panel]:
    """(title, which way is better, original, compressed, how to print) of every quantity that fits a bar."""
    ours, theirs = report.model, report.reference
    shared = report.context.get("memory_scope") == SHARED_PROCESS  # one figure for both says nothing about either
    return [
        ("Perplexity", "lower is better", theirs.perplexity, ours.perplexity, number),
        ("Weights on disk", "lower is better", theirs.bytes_on_disk, ours.bytes_on_disk, size),
        ("Peak memory", "lower is better", None if shared else theirs.peak_memory, ours.peak_memory, size),
        ("Prefill tokens/s", "higher is better", theirs.prefill_tokens_per_second, ours.prefill_tokens_per_second,
         number),
        ("Decode tokens/s", "higher is better", theirs.decode_tokens_per_second, ours.decode_tokens_per_second, number),
    ]  # fmt: skip


def _bars(axis: Axes, title: str, better: str, values: tuple[float, float], show: Callable[[float], str]) -> None:
    heights = [value if math.isfinite(value) else 0.0 for value in values]
    bars = axis.bar(("original", "compressed"), heights, color=_COLORS, width=0.62)
    axis.bar_label(bars, labels=[show(value) for value in values], fontsize=9, padding=2)
    axis.set_title(f"{title}\n", fontsize=10)
    axis.text(0.5, 1.02, better, transform=axis.transAxes, ha="center", va="bottom", fontsize=8, color="#5f6368")
    axis.set_ylim(0, 1.15 * max(*heights, 1e-12))
    axis.set_yticks([])
    axis.tick_params(axis="x", length=0, labelsize=9)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
