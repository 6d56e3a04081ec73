"""A callback that trains on the examples worth training on, in any Trainer. Shape legend: n examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hf_efficiency.integrations.transformers.selection_scores import batches_of, score_dataset
from hf_efficiency.integrations.transformers.selection_steering import SteeringCallback
from hf_efficiency.selection.choosing import check_k, check_scores
from hf_efficiency.selection.plans import SubsetPlan
from hf_efficiency.selection.pool import Pool, checksum
from hf_efficiency.selection.run import Run
from hf_efficiency.selection.scorers import BATCH_SCORERS, Context
from hf_efficiency.selection.selecting import Selection
from hf_efficiency.selection.strategies import STRATEGIES, Task, check_needs, settings_of

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from hf_efficiency.selection.plans import Plan


class DataSelectionCallback(SteeringCallback):
    """Trains on a share of the dataset, chosen by a strategy once or again and again.

    The dataset is not rebuilt and the number of steps stays what it was: an epoch makes as many draws as before, from
    the chosen examples alone. Set `max_steps` or `num_train_epochs` for a shorter run.

    ```python
    trainer = Trainer(..., callbacks=[DataSelectionCallback("d2", fraction=0.5, every="epoch", warmup=100)])
    ```

    Args:
        strategy: A name in `hf_efficiency.selection.STRATEGIES`. Those that ask a model ask the one in training, on the
            batches that the data collator makes; the others read the text column, or decode `input_ids`.
        fraction: Share of the examples to train on, in (0, 1].
        every: Optimizer steps between selections, `"epoch"`, or None for one.
        warmup: Optimizer steps on all examples before the first.
        target: Texts or rows of what is wanted, for strategies that have a goal.
        scores: Scores made beforehand (n,), or a `Selection`; nothing is computed then, and the strategy only chooses.
        average: Take the mean of all scores so far, as EL2N and GraNd are meant; off: the latest.
        batch_size: Examples that are scored together in a process; by default twice the training batch.
        seed: Of the order of the draws; by default the Trainer's.
        checkpoint: The folder that a run is resumed from, where it is not `checkpoint-N` in `output_dir`.
        **settings: Of the strategy.

    Raises:
        ValueError: When it is made: an unknown strategy or setting, or values out of range. When training begins: a
            streamed dataset, a missing target, scores of another dataset or with NaN, a checkpoint of another
            selection.
    """

    _file = "data_selection.safetensors"

    def __init__(
        self,
        strategy: str,
        *,
        fraction: float = 0.5,
        every: int | str | None = None,
        warmup: int = 0,
        target: Any = None,
        scores: Selection | Sequence[float] | NDArray[np.floating] | None = None,
        average: bool = False,
        batch_size: int | None = None,
        seed: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(every, warmup, seed, checkpoint, batch_size)
        self.strategy, self.settings = strategy, settings_of(strategy, settings)
        if not isinstance(fraction, float | int) or isinstance(fraction, bool) or not 0 < fraction <= 1:
            raise ValueError(f"fraction={fraction!r} is a share of the examples and must lie in (0, 1].")
        if strategy in ("exact", "minhash", "simhash"):
            raise ValueError(f"the strategy {strategy!r} removes duplicates; do that beforehand with select().")
        self._targeted = "target" in STRATEGIES[strategy].needs
        if self._targeted and scores is None:
            check_needs(strategy, True, True, target)
        if every is not None and (scores is not None or strategy not in (*BATCH_SCORERS, "random")):
            what = "given scores" if scores is not None else f"the scores of {strategy!r}"
            raise ValueError(
                f"every={every!r}: {what} do not change during training; leave it out, or use one of "
                f"{', '.join(BATCH_SCORERS)}."
            )
        self.fraction, self.target, self.average = float(fraction), target, average
        self._given = scores.scores if isinstance(scores, Selection) else scores
        self.selection: Selection | None = None
        self._sum: NDArray[np.float64] | None = None
        self._rounds = 0
        self._features: NDArray[np.float32] | None = None

    def _settings(self) -> dict[str, Any]:
        described: dict[str, Any] = {"strategy": self.strategy, "fraction": self.fraction, "average": self.average}
        described["settings"] = sorted((name, repr(value)) for name, value in self.settings.items())
        if self._targeted and self.target is not None:
            target = Pool([self.target] if isinstance(self.target, str) else self.target)
            described["target"] = checksum(len(target), *target.spot_checks())
        if self._given is not None:
            described["scores"] = checksum(np.asarray(self._given, np.float32).tobytes())
        return described

    def _prepare(self, dataloader: Any, model: Any, processing_class: Any) -> None:
        n = len(self.dataset)
        check_k(self.fraction, n, what="fraction")
        if self._given is not None:
            self._given = np.asarray(self._given, np.float32)
            if self._given.shape != (n,):
                raise ValueError(
                    f"scores have the shape {self._given.shape}, but the training dataset has {n} examples."
                )
            check_scores(self._given)
        self._sum, self._rounds, self._features = None, 0, None
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        pool = Pool(self.dataset, tokenizer=tokenizer)
        reads = self.strategy not in (*BATCH_SCORERS, "random") or (
            self.settings.get("neighbors", 0) and self.settings["features"] == "text"
        )
        cure = "set neighbors=0" if self.strategy == "d2" else "give scores= made beforehand with select()"
        if reads and self._given is None and pool.column == "input_ids" and tokenizer is None:
            raise ValueError(
                f"the strategy {self.strategy!r} reads texts, and the Trainer has no tokenizer to decode them: pass "
                f"processing_class= to the Trainer, or {cure}."
            )
        self._run = Run(pool, self.settings, (model,), tokenizer, self.target)

    def _restore(self, start: int, arrays: Mapping[str, NDArray[Any]]) -> Plan:
        return SubsetPlan(start, arrays["chosen"], self.seed)

    def _memory(self) -> dict[str, NDArray[Any]]:
        return {} if self._sum is None else {"sum": self._sum, "rounds": np.array([self._rounds])}

    def _recall(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        if "sum" in arrays:
            self._sum, self._rounds = arrays["sum"].copy(), int(arrays["rounds"][0])

    def _new_plan(self, start: int, model: Any) -> Plan:
        scores = self._scores(model)
        task = Task(
            check_k(self.fraction, len(scores)),
            self.settings,
            # another draw at random in each round
            int(np.random.SeedSequence([self.seed, start]).generate_state(1)[0]),
            self._all_features,
            self._run.mean_words,
        )
        chosen = STRATEGIES[self.strategy].choose(task, scores)
        self.report = {"start": start, "chosen": len(chosen), "pool": len(scores), **task.report}
        self.selection = Selection(chosen, np.ones(len(chosen), np.float32), scores, self.report)
        return SubsetPlan(start, np.sort(chosen), self.seed)

    def _scores(self, model: Any) -> NDArray[np.floating]:
        if self._given is not None:
            return np.asarray(self._given)
        if self.strategy not in BATCH_SCORERS:
            scores = STRATEGIES[self.strategy].score(self._run)
            check_scores(scores, f"the scores of {self.strategy!r}")
            return scores
        args = self._args
        size = self._score_rows
        context = Context(
            self.settings,
            None if self.target is None else self._run.target_batches,
            lambda limit: batches_of(self.dataset, self.collate, size, args.device, limit),
        )
        scorer = BATCH_SCORERS[self.strategy](model, context)
        scores = score_dataset(self.dataset, self.collate, scorer, model, args, size)
        if not self.average:
            return scores
        self._sum = scores.astype(np.float64) if self._sum is None else self._sum + scores
        self._rounds += 1
        return (self._sum / self._rounds).astype(np.float32)

    def _all_features(self) -> NDArray[np.float32]:
        # those of texts stay what they are while the model changes
        if self._features is None or self._run.settings["features"] == "model":
            self._features = self._run.features()
        return self._features
