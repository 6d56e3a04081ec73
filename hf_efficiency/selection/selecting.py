"""`select`: choose training data before training. Shape legend: n rows of the pool, k chosen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_efficiency.selection.choosing import check_k, check_scores
from hf_efficiency.selection.pool import Pool, checksum, texts_of
from hf_efficiency.selection.run import Run
from hf_efficiency.selection.scoring import ScoreCache
from hf_efficiency.selection.strategies import STRATEGIES, Task, check_needs, settings_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn


@dataclass(frozen=True)
class Selection:
    """What was chosen, and why.

    Attributes:
        indices: (k,) int64 rows of the pool, best first, or in the order of choice; in the pool's order where the
            strategy has none.
        weights: (k,) float32, one each; for strategies and users that weigh examples.
        scores: (n,) of all rows: higher is more of what the strategy measures. Minus infinity (for perplexity plus
            infinity) marks a row that has none, such as an empty text. For duplicates: the row that stands for each.
        report: Settings, counts and quantiles; JSON-able.
        column: Name of the dataset column that can keep the scores; it changes with everything they depend on.
    """

    indices: NDArray[np.int64]
    weights: NDArray[np.float32]
    scores: NDArray[np.floating]
    report: dict[str, Any] = field(default_factory=dict)
    column: str = ""

    def __len__(self) -> int:
        return len(self.indices)

    def apply(self, dataset: Any) -> Any:
        """The chosen rows, in the order of `indices`: a `datasets.Dataset`, or a list for a list of rows.

        Raises:
            ValueError: the dataset has not as many rows as were scored.
        """
        if len(dataset) != len(self.scores):
            raise ValueError(
                f"the dataset has {len(dataset)} rows, but {len(self.scores)} were scored: apply the selection to the "
                "dataset that was given to select()."
            )
        if hasattr(dataset, "select"):
            return dataset.select(self.indices)
        return [dataset[i] for i in self.indices.tolist()]

    def with_scores(self, dataset: Any) -> Any:
        """The dataset with the scores as the column `column`: `select` then reads them instead of computing them."""
        if not hasattr(dataset, "add_column"):
            raise TypeError(f"a {type(dataset).__name__} has no columns; give the datasets.Dataset that was scored.")
        if self.column in dataset.column_names:
            return dataset
        return dataset.add_column(self.column, self.scores.tolist())


def select(
    dataset: Any,
    strategy: str,
    k: int | float | None = None,
    *,
    model: nn.Module | Sequence[nn.Module] | None = None,
    tokenizer: Any = None,
    target: Any = None,
    text_column: str | None = None,
    seed: int = 0,
    batch_size: int = 8,
    max_length: int = 512,
    cache_dir: str | Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> Selection:
    """Choose k rows of a dataset.

    The dataset is read in batches, as often as the strategy needs; of each row only its score stays in memory, and for
    strategies of diversity its features.

    Args:
        dataset: Texts or rows; see `Pool`. May be streamed if it can be read more than once.
        strategy: A name in `STRATEGIES`.
        k: A number of rows, or a share of the pool as a float in (0, 1]. May be left out for strategies that draw a
            line themselves: cleaning and classifiers.
        model: A causal language model, for strategies that ask one; several (early checkpoints, say) are averaged over.
        tokenizer: The model's.
        target: Texts or rows of what is wanted, for strategies that have a goal.
        text_column: Where the text of a row is.
        seed: Of random choices.
        batch_size: Rows that the model sees together.
        max_length: Tokens of a row that the model sees.
        cache_dir: Keeps scores as they are computed; a call with the same arguments goes on where a killed one stopped.
        progress: Show a bar.
        **settings: Of the strategy; `STRATEGIES[strategy].settings` lists them with their defaults.

    Raises:
        ValueError: an unknown strategy or setting, an empty dataset, k above the pool, a model or target that is
            missing, NaN among the scores, or a `cache_dir` of another selection. All but NaN before any long work.
        TypeError: a dataset that can be read only once, or a k that is no number.
        ImportError: a library that the strategy needs is missing.
    """
    values = settings_of(strategy, settings)
    row = STRATEGIES[strategy]
    models = _as_models(model)
    check_needs(strategy, models, tokenizer, target)
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    pool = Pool(dataset, text_column, tokenizer)
    if k is None and not row.optional_k:
        raise ValueError(f"the strategy {strategy!r} needs k, the number or the share of the rows to choose.")
    if k is not None:
        check_k(k, len(pool) if pool.known_length is not None or not isinstance(k, float) else 1 << 62)
    wanted = None if target is None else texts_of(target, tokenizer)
    key = _key(strategy, values, pool, models, tokenizer, wanted, max_length, seed if row.seeded else None)
    cache = None if cache_dir is None or not row.ranks else ScoreCache(cache_dir, key)
    run = Run(pool, values, models, tokenizer, target, seed, batch_size, max_length, cache, progress)
    start = time.perf_counter()
    column = f"{strategy}_{key}"
    scores = _stored(dataset, column)
    if scores is None:
        scores = row.score(run)
    scored = time.perf_counter()
    check_scores(scores, f"the scores of {strategy!r}")
    task = Task(None if k is None else check_k(k, len(scores)), values, seed, run.features, run.mean_words, run.report)
    indices = row.choose(task, scores)
    report = {
        "strategy": strategy,
        "settings": {name: _shown(value) for name, value in values.items()},
        "seed": seed,
        "pool": len(scores),
        "chosen": len(indices),
        **_quantiles(scores, indices),
        **run.report,
        "seconds": {"scoring": round(scored - start, 3), "choosing": round(time.perf_counter() - scored, 3)},
    }
    return Selection(indices, np.ones(len(indices), np.float32), scores, report, column)


def _as_models(model: Any) -> Sequence[Any]:
    if model is None:
        return ()
    return tuple(model) if isinstance(model, Sequence) else (model,)


def _stored(dataset: Any, column: str) -> NDArray[np.floating] | None:
    """Scores that an earlier selection has put into the dataset."""
    names = getattr(dataset, "column_names", None)
    if names is None or column not in names or not hasattr(dataset, "__getitem__"):
        return None
    return np.asarray(dataset[column][:], np.float64)


def _key(strategy: str, values: dict[str, Any], pool: Pool, *parts: Any) -> str:
    """A checksum of what the scores depend on."""
    models, tokenizer, wanted, max_length, seed = parts
    described: list[Any] = [strategy, sorted((name, _described(value)) for name, value in values.items())]
    described += [pool.column, pool.known_length, *pool.spot_checks()]
    described += [model_checksum(model) for model in models]
    described += [type(tokenizer).__name__ if models else None, max_length if models else None, seed]
    if wanted is not None:
        described.append(wanted)
    return checksum(*described)


def model_checksum(model: nn.Module) -> str:
    """A checksum of some entries of every parameter: it changes with training, and costs little."""
    parts: list[Any] = []
    for name, tensor in model.state_dict().items():
        if hasattr(tensor, "shape"):
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // 16)][:16].float().cpu()
            parts += [name, tuple(tensor.shape), some.numpy().tobytes()]
    return checksum(*parts)


def _described(value: Any) -> Any:
    return checksum(value.tobytes()) if isinstance(value, np.ndarray) else repr(value)


def _shown(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return f"array of shape {value.shape}"
    return value if isinstance(value, int | float | str | bool | type(None)) else repr(value)


def _quantiles(scores: NDArray[np.floating], indices: NDArray[np.int64]) -> dict[str, Any]:
    finite = np.isfinite(scores)
    if not finite.any():
        return {"unscored": len(scores)}
    at = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]
    chosen = scores[indices]
    chosen = chosen[np.isfinite(chosen)]

    def quantiles(values: NDArray[np.floating]) -> dict[str, float]:
        return dict(zip(map(str, at), np.quantile(values, at).tolist(), strict=True)) if len(values) else {}

    return {
        "unscored": int((~finite).sum()),
        "quantiles": quantiles(scores[finite]),
        "quantiles_chosen": quantiles(chosen),
    }
