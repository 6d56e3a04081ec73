"""The calibration and the evaluation text of one run, and the proof that they differ."""

from __future__ import annotations

from dataclasses import dataclass

from hf_efficiency.calibration.data import default_texts
from hf_efficiency.evaluation import EvaluationText, default_text, read_text
from hf_efficiency.evaluation.text import shared_runs

# A few set phrases occur in any two texts; more means that one text is part of the other.
_MAX_SHARED = 0.01


@dataclass(frozen=True)
class CalibrationText:
    """What --calibration stands for."""

    value: str | list[str] | None  # for the config; None leaves the config's default
    text: str | None  # what is read, where it is known beforehand
    description: str | None

    def overlap(self, text: str) -> float | None:
        """Share of the eight-word runs of `text` that occur in the calibration text; None if that is not known."""
        return None if self.text is None else shared_runs(text, self.text)


def calibration_text(option: str | None) -> CalibrationText:
    """The text behind --calibration default, self or FILE.

    Raises:
        ValueError: the file cannot be read.
    """
    if option == "self":
        return CalibrationText("self", None, "text sampled from the original model itself")
    if option in (None, "default"):
        return CalibrationText(option, "\n\n".join(default_texts()), "Python's language reference (pydoc_data.topics)")
    found = read_text(option)
    return CalibrationText([found.text], found.text, found.description)


def evaluation_text(option: str, calibration: CalibrationText) -> EvaluationText:
    """The text behind --eval-text default or FILE.

    Raises:
        ValueError: the file cannot be read, or more than 1 % of it was calibrated on.
    """
    found = default_text() if option == "default" else read_text(option)
    overlap = calibration.overlap(found.text)
    if overlap is not None and overlap > _MAX_SHARED:
        raise ValueError(
            f"{100 * overlap:.0f} % of the evaluation text occurs in the calibration text too, so its perplexity would "
            "look better than it is: evaluate on another text (--eval-text FILE)"
        )
    return found
