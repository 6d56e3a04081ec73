"""Callbacks for the order and the mixture of training data. Shape legend: n examples, s sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_efficiency.integrations.transformers.selection_scores import mean_losses, score_dataset
from hf_efficiency.integrations.transformers.selection_steering import SteeringCallback
from hf_efficiency.selection.choosing import check_scores
from hf_efficiency.selection.curriculum import Competence, Pace
from hf_efficiency.selection.plans import CurriculumPlan, MixturePlan
from hf_efficiency.selection.pool import Pool, checksum
from hf_efficiency.selection.run import Run
from hf_efficiency.selection.scorers import BATCH_SCORERS, Context
from hf_efficiency.selection.strategies import STRATEGIES, settings_of

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

    from hf_efficiency.selection.plans import Plan
    from hf_efficiency.selection.skill_it import SkillIt


class CurriculumCallback(SteeringCallback):
    """From easy to hard: an example is drawn only once the competence c(t) has reached its difficulty.

    Args:
        difficulty: `length` or `rarity` (of the text), a score of the model in training (`loss`, `perplexity`, `el2n`,
            `grand`, `entropy`, ...), or one number for each example; higher is harder.
        pace: `root`, `linear`, `geometric` or `step`.
        start: Share of the examples, easiest first, that is in from the beginning.
        length: Share of training after which all are in.
        every: With a score of the model: steps between measurements, or `"epoch"` (a dynamic curriculum); None measures
            once.
        warmup: Optimizer steps on all examples before the curriculum.
        descending: From hard to easy.
        batch_size: Examples that are scored together in a process.
        seed: Of the draws; by default the Trainer's.
        checkpoint: The folder that a run is resumed from, where it is not `checkpoint-N` in `output_dir`.

    Raises:
        ValueError: When it is made: a value out of range. When training begins: difficulties of another dataset or with
            NaN, a checkpoint of another curriculum.
    """

    _file = "curriculum.safetensors"

    def __init__(
        self,
        difficulty: str | Sequence[float] | NDArray[np.floating] = "length",
        *,
        pace: Pace = "root",
        start: float = 0.1,
        length: float = 0.5,
        every: int | str | None = None,
        warmup: int = 0,
        descending: bool = False,
        batch_size: int | None = None,
        seed: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(every, warmup, seed, checkpoint, batch_size)
        self.competence = Competence(pace, start, length)
        known = ("length", "rarity", *(name for name in BATCH_SCORERS if name != "influence"))
        if isinstance(difficulty, str) and difficulty not in known:
            raise ValueError(
                f"difficulty={difficulty!r} is unknown: use a number for each example, or {', '.join(known)}."
            )
        if every is not None and not (isinstance(difficulty, str) and difficulty in BATCH_SCORERS):
            raise ValueError(f"every={every!r}: this difficulty does not change during training; leave it out.")
        self.difficulty, self.descending = difficulty, descending

    def _settings(self) -> dict[str, Any]:
        difficulty = self.difficulty
        if not isinstance(difficulty, str):
            difficulty = checksum(np.asarray(difficulty, np.float32).tobytes())
        return {"difficulty": difficulty, "competence": repr(self.competence), "descending": self.descending}

    def _prepare(self, dataloader: Any, model: Any, processing_class: Any) -> None:
        n = len(self.dataset)
        if not isinstance(self.difficulty, str):
            values = np.asarray(self.difficulty, np.float32)
            if values.shape != (n,):
                raise ValueError(f"difficulty has the shape {values.shape}, but the training dataset has {n} examples.")
            check_scores(values, "difficulty")
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._run = None
        if isinstance(self.difficulty, str) and self.difficulty in ("length", "rarity"):
            self._run = Run(Pool(self.dataset, tokenizer=tokenizer), {})

    def _restore(self, start: int, arrays: Mapping[str, NDArray[Any]]) -> Plan:
        return self._plan(start, arrays["difficulty"]) if "difficulty" in arrays else self._first_plan()

    def _new_plan(self, start: int, model: Any) -> Plan:
        scores = self._measured(model)
        self.report = {"start": start, "hardest": int(np.argmax(scores)), "easiest": int(np.argmin(scores))}
        return self._plan(start, -scores if self.descending else scores)

    def _plan(self, start: int, difficulty: NDArray[np.float32]) -> Plan:
        return CurriculumPlan(start, difficulty, self.seed, self.competence, self._attached().draws, self.total_draws)

    def _measured(self, model: Any) -> NDArray[np.float32]:
        if not isinstance(self.difficulty, str):
            return np.asarray(self.difficulty, np.float32)
        if self._run is not None:
            return np.asarray(STRATEGIES[self.difficulty].score(self._run), np.float32)
        scorer = BATCH_SCORERS[self.difficulty](model, Context(settings_of(self.difficulty, {})))
        return score_dataset(self.dataset, self.collate, scorer, model, self._args, self._score_rows)


class MixtureCallback(SteeringCallback):
    """Draws sources in given shares, or in shares that follow their losses (Skill-It).

    Args:
        sources: The source of each example, such as `dataset["source"]`.
        weights: Share of each source by name (normalised to one; sources that are not named get none), as from
            `UtiliMax`, or a `SkillIt` whose rows are the sources in the order of their first appearance.
        evaluation: With `SkillIt`: the examples (tokenized as the training dataset is) of each evaluated skill, in the
            order of the graph's columns.
        every: With `SkillIt`: optimizer steps between evaluations, or `"epoch"`.
        warmup: Optimizer steps before the first evaluation.
        batch_size: Examples that are evaluated together in a process.
        seed: Of the draws; by default the Trainer's.
        checkpoint: The folder that a run is resumed from, where it is not `checkpoint-N` in `output_dir`.

    Raises:
        ValueError: weights that are negative or name no source, a graph of another size, sources of another dataset, a
            checkpoint of another mixture.
    """

    _file = "mixture.safetensors"

    def __init__(
        self,
        sources: Sequence[Any],
        weights: Mapping[str, float] | SkillIt,
        *,
        evaluation: Mapping[str, Any] | None = None,
        every: int | str | None = None,
        warmup: int = 0,
        batch_size: int | None = None,
        seed: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(every, warmup, seed, checkpoint, batch_size)
        labels = [str(source) for source in sources]
        self.names = list(dict.fromkeys(labels))
        numbers = {name: i for i, name in enumerate(self.names)}
        self._of_each = np.fromiter((numbers[label] for label in labels), np.int64, len(labels))
        if not self.names:
            raise ValueError("sources is empty: give the source of each example, such as dataset['source'].")
        self.skill_it: SkillIt | None = None if isinstance(weights, Mapping) else weights
        self.evaluation = evaluation
        if self.skill_it is None:
            self.weights = self._checked(weights)  # type: ignore[arg-type]
            if every is not None or evaluation is not None:
                raise ValueError("every and evaluation are for SkillIt; fixed weights do not change.")
            return
        shape = self.skill_it.graph.shape
        if evaluation is None or every is None:
            raise ValueError(
                "SkillIt needs evaluation=, examples of each evaluated skill, and every=, steps or 'epoch'."
            )
        if shape != (len(self.names), len(evaluation)):
            raise ValueError(
                f"the skill graph has the shape {shape}, but there are {len(self.names)} sources ({self.names}) and "
                f"{len(evaluation)} evaluated skills."
            )
        if any(len(rows) == 0 for rows in evaluation.values()):
            raise ValueError("an evaluated skill has no examples.")
        self.weights = self.skill_it.start()

    def _checked(self, weights: Mapping[str, float]) -> NDArray[np.float64]:
        unknown = sorted(set(map(str, weights)) - set(self.names))
        if unknown:
            raise ValueError(f"weights name {unknown[0]!r}, but the sources are {self.names}.")
        values = np.array([weights.get(name, 0.0) for name in self.names], np.float64)
        if not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
            raise ValueError(f"weights={dict(weights)} must be finite, not negative, and not all zero.")
        return values / values.sum()

    def _settings(self) -> dict[str, Any]:
        graph = self.skill_it
        described = self.weights.tolist() if graph is None else [graph.graph.tolist(), graph.eta, graph.window]
        return {"sources": checksum(self._of_each.tobytes(), self.names), "weights": repr(described)}

    def _prepare(self, dataloader: Any, model: Any, processing_class: Any) -> None:
        if len(self._of_each) != len(self.dataset):
            raise ValueError(
                f"sources names {len(self._of_each)} examples, but the training dataset has {len(self.dataset)}."
            )
        self._rows = [np.flatnonzero(self._of_each == i) for i in range(len(self.names))]
        if self.skill_it is not None:
            self.skill_it.losses.clear()
            self.weights = self.skill_it.start()

    def _first_plan(self) -> Plan:
        return self._plan(0, self.weights)

    def _restore(self, start: int, arrays: Mapping[str, NDArray[Any]]) -> Plan:
        self.weights = arrays["weights"].copy()
        return self._plan(start, self.weights)

    def _memory(self) -> dict[str, NDArray[Any]]:
        if self.skill_it is None or not self.skill_it.losses:
            return {}
        return {"losses": np.array(list(self.skill_it.losses))}

    def _recall(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        if self.skill_it is not None and "losses" in arrays:
            self.skill_it.losses.extend(arrays["losses"].tolist())

    def _new_plan(self, start: int, model: Any) -> Plan:
        if self.skill_it is not None and self.evaluation is not None:
            losses = mean_losses(self.evaluation, self.collate, model, self._args, self._score_rows)
            self.weights = self.skill_it.update(losses)
            self.report["losses"] = dict(zip(self.evaluation, losses, strict=True))
        self.report["weights"] = dict(zip(self.names, self.weights.tolist(), strict=True))
        return self._plan(start, self.weights)

    def _plan(self, start: int, weights: NDArray[np.float64]) -> Plan:
        return MixturePlan(start, weights, self.seed, self._rows, self._attached().draws)
