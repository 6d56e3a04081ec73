"""The report of one fine-tuning: the loss of every step, held-out perplexity before and after, and what it took."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_efficiency.evaluation.report import number, size

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_FORMAT = 1
_SMOOTHED = 25  # points of the running mean in the plot, at most a tenth of the steps


@dataclass
class FinetuneReport:
    """What a fine-tuning did.

    Attributes:
        losses: Mean training loss (nats a token) of each step, from step 1.
        loss_before: Held-out loss (nats a token) of the base without the adapter.
        loss_after: Held-out loss with it.
        held_out_tokens: Tokens that both are means over.
        trainable_parameters: Of the adapter.
        parameters: Weights that the whole model stands for, packed ones counted as weights.
        adapter_bytes: Of the adapter's weight file.
        optimizer_bytes: Held by the optimizer at the end, on one process.
        peak_memory: Bytes; see `evaluation.footprint.peak_memory`.
        seconds: Of the training loop, wall time, in this process since it last began.
        context: What the numbers depend on, all JSON: `peft_type`, `data`, `settings` (the config of the adapter),
            `command`, `versions`, `device`, `dtype`, `processes`, and where known `base_model`, `quantization`,
            `load` (Python that loads the base as `base`), `license`, `languages`.
    """

    losses: list[float]
    loss_before: float
    loss_after: float
    held_out_tokens: int
    trainable_parameters: int
    parameters: int
    adapter_bytes: int
    optimizer_bytes: int
    peak_memory: int
    seconds: float
    context: dict[str, Any] = field(default_factory=dict)

    def to_json(self, path: str | Path) -> None:
        """Writes the report; what is not finite becomes null."""
        data = {"format": _FORMAT, **dataclasses.asdict(self)}
        data["losses"] = [loss if math.isfinite(loss) else None for loss in self.losses]
        for name in ("loss_before", "loss_after"):
            data[name] = data[name] if math.isfinite(data[name]) else None
        Path(path).write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much) as text, for the terminal and the card alike."""
        share = 100 * self.trainable_parameters / self.parameters
        return [
            ("Held-out perplexity before", number(_exp(self.loss_before))),
            ("Held-out perplexity after", number(_exp(self.loss_after))),
            ("Held-out tokens", f"{self.held_out_tokens:,}"),
            ("Training loss, first and last step", f"{self.losses[0]:.3f}, {self.losses[-1]:.3f}"),
            ("Steps", f"{len(self.losses):,}"),
            ("Trainable parameters", f"{self.trainable_parameters:,} ({share:.2g} %)"),
            ("Adapter on disk", size(self.adapter_bytes)),
            ("Optimizer state", size(self.optimizer_bytes)),
            ("Peak memory of the process", size(self.peak_memory)),
            ("Training time", f"{self.seconds:.0f} s"),
        ]

    def plot(self, path: str | Path) -> None:
        """Draws a PNG: the training loss of each step, its running mean, and the held-out loss before and after."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        steps = range(1, len(self.losses) + 1)
        axis.plot(steps, self.losses, color="#9aa0a6", linewidth=0.8, label="training loss of a step")
        window = min(_SMOOTHED, len(self.losses) // 10)
        if window > 1:
            means = [sum(self.losses[i - window : i]) / window for i in range(window, len(self.losses) + 1)]
            axis.plot(steps[window - 1 :], means, color="#1f6feb", label=f"mean of {window} steps")
        ends = (0, len(self.losses)), (self.loss_before, self.loss_after)
        axis.plot(*ends, linestyle="none", marker="o", color="#d1242f", label="held-out loss, before and after")
        axis.set_xlabel("step")
        axis.set_ylabel("nats a token")
        axis.legend(frameon=False, fontsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        figure.savefig(Path(path), format="png")

    def to_card(self, plot: str) -> ModelCard:
        """The model card with YAML metadata; `plot` is the picture's name beside it."""
        from huggingface_hub import EvalResult, ModelCard, ModelCardData

        context = self.context
        base, kind = context.get("base_model"), str(context["peft_type"])
        name = f"{str(base).rsplit('/', 1)[-1]} {kind}" if base else f"{kind} adapter"
        known = {"base_model": base, "license": context.get("license"), "language": context.get("languages")}
        measured = [
            EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=f"held-out part of {context['data']}",
                metric_type="perplexity",
                metric_name="Perplexity",
                metric_value=round(_exp(self.loss_after), 5),
            )
        ]
        data = ModelCardData(
            library_name="peft",
            pipeline_tag="text-generation",
            tags=["hf_efficiency", "adapter", kind.lower()],
            model_name=name,
            eval_results=measured if math.isfinite(self.loss_after) else None,
            ignore_metadata_errors=False,
            **{key: value for key, value in known.items() if value is not None},
        )
        return ModelCard.from_template(
            data,
            template_str=resources.files("hf_efficiency.evaluation").joinpath("finetune_card.md").read_text("utf-8"),
            title=name,
            kind=kind,
            base=f"[{base}](https://huggingface.co/{base})" if base else "a local model",
            rows=self.rows(),
            plot=plot,
            context=context,
            settings=json.dumps(context.get("settings", {}), indent=2, ensure_ascii=False, default=str),
            versions=", ".join(f"{key} {value}" for key, value in context.get("versions", {}).items()),
        )


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
