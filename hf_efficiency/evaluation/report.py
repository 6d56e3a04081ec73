"""The report of one compression: what was lost and what was gained, with everything needed to repeat it."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from huggingface_hub import ModelCard

_FORMAT = 1

# context["memory_scope"]: what the peak memory of a report is the peak of
SHARED_PROCESS = "one process that holds both models"
OWN_PROCESS = "a process that runs only this model"
GPU_TENSORS = "this model's run on the GPU"


@dataclass
class Measurements:
    """What was measured on one of the two models."""

    perplexity: float
    bytes_on_disk: int  # weight files
    bits_per_weight: float  # over the whole model
    bits_per_quantized_weight: float | None = None  # over the quantized linear layers; None if there are none
    peak_memory: int | None = None  # bytes, see evaluation.footprint.peak_memory
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    answer: str | None = None  # to context["prompt"]


@dataclass
class Report:
    """A compressed model beside its original, measured on the same tokens.

    Attributes:
        model: the compressed model.
        reference: the original.
        mean_kl: KL(reference || model) in nats, mean over the predicted tokens.
        top1_agreement: share of tokens, 0 to 1, for which both models rank the same token first.
        context: what the numbers depend on, all JSON: `text`, `window`, `windows`, `tokens`, `dtype`, `device`,
            `threads`, `versions`, `quantization` (the model's quantization config), `prompt`, and where known
            `command`, `calibration`, `base_model`, `license`, `languages`, `memory_scope`.
    """

    model: Measurements
    reference: Measurements
    mean_kl: float
    top1_agreement: float
    context: dict[str, Any] = field(default_factory=dict)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, written to `path` if one is given. NaN and infinity become null."""
        data = {"format": _FORMAT, **_finite(dataclasses.asdict(self))}
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Report:
        """Read back what `to_json` wrote: `source` is the file (a `Path`, or a name that ends in .json) or the text.

        Raises:
            ValueError: it is not such a report, or one of a newer version.
        """
        if isinstance(source, Path) or source.endswith(".json"):
            source = Path(source).read_text(encoding="utf-8")
        try:
            data = json.loads(source)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a report: {error}") from error
        if not isinstance(data, dict) or "format" not in data:
            raise ValueError("not a report: it has no field 'format'")
        if data.pop("format") != _FORMAT:
            raise ValueError(f"the report is of another version than {_FORMAT}: read it with a newer hf_efficiency")
        try:
            model, reference = (_measurements(data.pop(name)) for name in ("model", "reference"))
            return cls(model, reference, **data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a report: {error}") from error

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, original, compressed) as text, for the terminal and the model card alike."""
        scope = self.context.get("memory_scope")
        before, after = dict(rows_of(self.reference, scope)), dict(rows_of(self.model, scope))
        labels = list(dict.fromkeys([*after, *before]))
        rows = [(label, before.get(label, "-"), after.get(label, "-")) for label in labels]
        rows[1:1] = [
            ("Mean KL to the original (nats a token)", "-", number(self.mean_kl)),
            ("Top-1 agreement with the original", "-", f"{100 * self.top1_agreement:.1f} %"),
        ]
        return rows

    def table(self) -> str:
        """A plain-text table for the terminal."""
        lines = [("", "original", "compressed"), *self.rows()]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in lines)

    def plot(self, path: str | Path) -> Path:
        """Draw the report as one PNG; see `evaluation.plot.draw`."""
        from hf_efficiency.evaluation.plot import draw

        return draw(self, path)

    def to_card(self, *, plot: str | None = None, repo_id: str | None = None) -> ModelCard:
        """The model card; `plot` is the picture's file name beside it, `repo_id` where it will be on the Hub."""
        from hf_efficiency.evaluation.card import make_card

        return make_card(self, plot=plot, repo_id=repo_id)


def _measurements(data: dict[str, Any]) -> Measurements:
    if data.get("perplexity", 0) is None:  # JSON has no infinity
        data["perplexity"] = math.inf
    return Measurements(**data)


def rows_of(measured: Measurements, memory_scope: str | None = None) -> list[tuple[str, str]]:
    """(what, how much) as text, of everything that was measured; see `Report.context` for `memory_scope`."""
    values: list[tuple[str, float | None, Callable[[float], str]]] = [
        ("Perplexity (lower is better)", measured.perplexity, number),
        ("Weights on disk", measured.bytes_on_disk, size),
        ("Bits per weight, whole model", measured.bits_per_weight, number),
        ("Bits per weight, quantized layers", measured.bits_per_quantized_weight, number),
        (f"Peak memory of {memory_scope or 'the process'}", measured.peak_memory, size),
        ("Prefill (tokens/s)", measured.prefill_tokens_per_second, number),
        ("Decode (tokens/s)", measured.decode_tokens_per_second, number),
    ]
    return [(label, show(value)) for label, value, show in values if value is not None]


def number(value: float) -> str:
    """Four significant digits or so, without exponent where that is readable: 29.31, 0.0712, 1,249, and 16 for 16."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.2g}"
    return f"{value:.{min(3 - math.floor(math.log10(abs(value))), 4)}f}"


def size(count: float) -> str:
    """Bytes in MB or GB (powers of ten, as on a disk's label)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
