"""The table of strategies: how each scores, how it chooses, what it needs and what can be set.

Shape legend: n rows of the pool, k chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_efficiency.selection import choosing, perplexity, scorers
from hf_efficiency.selection.classifier import QualityClassifier
from hf_efficiency.selection.d2_pruning import D2
from hf_efficiency.selection.dpp import greedy_map
from hf_efficiency.selection.dsir import DSIR
from hf_efficiency.selection.facility_location import facility_location
from hf_efficiency.selection.hybrid import choose_diverse
from hf_efficiency.selection.kmeans import choose_from_clusters, kmeans
from hf_efficiency.selection.language import Language
from hf_efficiency.selection.minhash import MinHash
from hf_efficiency.selection.quality_rules import QualityRules
from hf_efficiency.selection.simhash import SimHash

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_efficiency.selection.run import Run


@dataclass
class Task:
    """What is known when rows are chosen.

    Attributes:
        k: Rows to choose, or None for all that the strategy approves of.
        settings: Of the strategy.
        seed: Of random choices.
        features: Makes the features (n, d) of all rows.
        mean_words: Words of a row on average.
        report: Takes what is worth telling.
    """

    k: int | None
    settings: Mapping[str, Any]
    seed: int
    features: Callable[[], NDArray[np.float32]]
    mean_words: Callable[[], float]
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """k, where a strategy has no choice of its own.

        Raises:
            ValueError: k is None.
        """
        if self.k is None:
            raise ValueError("this strategy needs k, the number or the share of the rows to choose.")
        return self.k


@dataclass(frozen=True)
class Strategy:
    """One row.

    Attributes:
        summary: A line for the command line.
        score: Scores of all rows, (n,).
        choose: Rows by their scores.
        needs: Of `model`, `tokenizer` and `target`.
        settings: What can be set, with defaults.
        optional_k: Whether k may be left out.
        ranks: Whether higher scores mean better or harder rows, so that other strategies can weigh them.
        seeded: Whether the scores depend on the seed.
    """

    summary: str
    score: Callable[[Run], NDArray[np.floating]]
    choose: Callable[[Task, NDArray[np.floating]], NDArray[np.int64]]
    needs: frozenset[str] = frozenset()
    settings: Mapping[str, Any] = field(default_factory=dict)
    optional_k: bool = False
    ranks: bool = True
    seeded: bool = False


def check_needs(name: str, model: Any, tokenizer: Any, target: Any) -> None:
    """ValueError that says what the strategy lacks."""
    given = {"model": bool(model), "tokenizer": tokenizer is not None, "target": target is not None}
    missing = sorted(need for need in STRATEGIES[name].needs if not given[need])
    if missing:
        hints = {
            "model": "model=, a causal language model",
            "target": "target=, texts or a dataset of what is wanted",
            "tokenizer": "tokenizer=, the model's tokenizer",
        }
        raise ValueError(f"the strategy {name!r} needs " + " and ".join(hints[need] for need in missing) + ".")


def settings_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The strategy's settings with those that are given.

    Raises:
        ValueError: an unknown strategy or setting.
    """
    if name not in STRATEGIES:
        raise ValueError(f"the strategy {name!r} is unknown; there are {', '.join(STRATEGIES)}.")
    known = STRATEGIES[name].settings
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"the strategy {name!r} has no setting {unknown[0]!r}; it has {', '.join(known) or 'none'}.")
    return {**known, **given}


def _top(task: Task, scores: NDArray[np.floating]) -> NDArray[np.int64]:
    return choosing.top_k(scores, task.number)


def _random(task: Task, scores: NDArray[np.floating]) -> NDArray[np.int64]:
    return choosing.draw(np.ones(len(scores), bool), task.number, task.seed)


def _band(task: Task, scores: NDArray[np.floating]) -> NDArray[np.int64]:
    low, high = task.settings["low"], task.settings["high"]
    unscored = np.where(np.isneginf(scores), np.inf, scores)
    return perplexity.choose_band(unscored, task.number, low, high, task.seed)


def _perplexity(task: Task, scores: NDArray[np.floating]) -> NDArray[np.int64]:
    if task.settings["nearest"] not in (None, "median"):
        raise ValueError(f"nearest={task.settings['nearest']!r} is unknown: use None (a band) or 'median'.")
    return _band(task, scores) if task.settings["nearest"] is None else perplexity.choose_median(scores, task.number)


def _resample(task: Task, scores: NDArray[np.floating]) -> NDArray[np.int64]:
    # A document's log-weight is a sum over its n-grams. All are taken to be as long as the average one, so that neither
    # their length nor the noise outweighs what the mean says.
    grams = task.report.get("ngrams_per_text") or task.mean_words() * task.settings["max_n"]
    log_weights = np.where(np.isfinite(scores), scores * max(1.0, grams), -np.inf)
    return choosing.gumbel_top_k(log_weights, task.number, task.seed, task.settings["temperature"])


def _d2(task: Task, scores: NDArray[np.floating]) -> NDArray[np.int64]:
    config = D2(**{name: task.settings[name] for name in D2.__dataclass_fields__})
    losses = np.where(np.isneginf(scores), np.inf, scores)
    return config.choose(losses, task.number, task.features() if config.neighbors else None)


def _kmeans(task: Task, scores: NDArray[np.floating]) -> NDArray[np.int64]:
    features, settings = task.features(), task.settings
    clusters = settings["clusters"] or max(1, min(len(features), round(len(features) ** 0.5)))
    labels, distances = kmeans(features, clusters, task.seed)
    task.report["clusters"] = clusters
    return choose_from_clusters(
        labels,
        distances,
        task.number,
        within=settings["within"],
        proportional=settings["proportional"],
        seed=task.seed,
    )


def _facility_location(task: Task, scores: NDArray[np.floating]) -> NDArray[np.int64]:
    chosen, gains = facility_location(task.features(), task.number, seed=task.seed)
    task.report["coverage"] = float(gains.sum() / len(scores))
    return chosen


def _dpp(task: Task, scores: NDArray[np.floating]) -> NDArray[np.int64]:
    return greedy_map(task.features(), task.number)[0]


def _hybrid(task: Task, scores: NDArray[np.floating]) -> NDArray[np.int64]:
    diversity = task.settings["diversity"]
    return choose_diverse(scores, task.number, task.features(), diversity) if diversity else _top(task, scores)


def _from_threshold(threshold: str | float) -> Callable[[Task, NDArray[np.floating]], NDArray[np.int64]]:
    """The k best, or without k all rows from a bound on: a setting's name, or a number."""

    def choose(task: Task, scores: NDArray[np.floating]) -> NDArray[np.int64]:
        choosing.check_scores(scores)
        bound = task.settings[threshold] if isinstance(threshold, str) else threshold
        task.report["threshold"] = bound
        return np.flatnonzero(scores >= bound) if task.k is None else choosing.top_k(scores, task.k)

    return choose


def _first_of_each(task: Task, scores: NDArray[np.floating]) -> NDArray[np.int64]:
    first = scores == np.arange(len(scores))
    kept = int(first.sum())
    task.report["duplicates"] = len(scores) - kept
    task.report["largest_cluster"] = int(np.bincount(scores.astype(np.int64)).max(initial=0))
    if task.k is None:
        return np.flatnonzero(first)
    if task.k > kept:
        raise ValueError(f"k={task.k} is above the {kept} rows that are left without duplicates: lower k.")
    return choosing.draw(first, task.k, task.seed)


def _fields(config: Any) -> dict[str, Any]:
    """What can be set, but for the seed, which `select` has."""
    return {name: spec.default for name, spec in config.__dataclass_fields__.items() if name != "seed"}


def _no_scores(run: Run) -> NDArray[np.float32]:
    return np.zeros(len(run.pool), np.float32)


_MODEL = frozenset({"model", "tokenizer"})
_TARGET = frozenset({"target"})
_FEATURES: dict[str, Any] = {"features": "text", "dim": 128}
_BY = {name: partial(scorers.score_by_model, name) for name in scorers.BATCH_SCORERS}
_DUPLICATES = {name: partial(scorers.score_duplicates, name) for name in ("exact", "minhash", "simhash")}

STRATEGIES: dict[str, Strategy] = {
    "random": Strategy("rows at random, to compare with", _no_scores, _random, ranks=False),
    # towards a target
    "dsir": Strategy(
        "importance of hashed n-grams for a target", scorers.score_dsir, _resample, _TARGET,
        {**_fields(DSIR), "temperature": 1.0},
    ),
    "classifier": Strategy(
        "a linear classifier of the target against the pool", scorers.score_classifier,
        _from_threshold("threshold"), _TARGET, {**_fields(QualityClassifier), "threshold": 0.5}, optional_k=True,
        seeded=True,
    ),
    "influence": Strategy(
        "gradients that point where the target's do", _BY["influence"], _top, _MODEL | _TARGET,
        {"method": "less", "rank": 8, "max_layers": 32, "sample": 256, "damping": 0.1, "groups": 64},
    ),
    "medu": Strategy(
        "usefulness for a task as the model itself grades it", scorers.score_medu, _top, _MODEL,
        {"task": "", "max_characters": 2000},
    ),
    # by what a model finds
    "perplexity": Strategy(
        "a band of perplexity, or what is nearest to the median", _BY["perplexity"], _perplexity, _MODEL,
        {"low": 0.1, "high": 0.9, "nearest": None},
    ),
    "loss": Strategy("a band of the loss", _BY["loss"], _band, _MODEL, {"low": 0.1, "high": 0.9}),
    "el2n": Strategy("a band of the error's norm", _BY["el2n"], _band, _MODEL, {"low": 0.2, "high": 0.9}),
    "grand": Strategy("a band of the gradient's norm", _BY["grand"], _band, _MODEL, {"low": 0.2, "high": 0.9}),
    "d2": Strategy(
        "loss without both ends, spread over a graph of neighbours", _BY["d2"], _d2, _MODEL,
        {**_fields(D2), **_FEATURES},
    ),
    "entropy": Strategy("the highest entropy", _BY["entropy"], _top, _MODEL),
    "variation-ratio": Strategy("the least confident", _BY["variation-ratio"], _top, _MODEL),
    "bald": Strategy(
        "the largest disagreement under dropout", _BY["bald"], _top, _MODEL, {"passes": 8, "dropout": None}
    ),
    # diverse rows
    "kmeans": Strategy(
        "rows from all clusters", _no_scores, _kmeans,
        settings={**_FEATURES, "clusters": None, "within": "random", "proportional": True}, ranks=False,
    ),
    "facility-location": Strategy(
        "rows that represent all others", _no_scores, _facility_location, settings=_FEATURES, ranks=False
    ),
    "dpp": Strategy("rows that differ the most", _no_scores, _dpp, settings=_FEATURES, ranks=False),
    "hybrid": Strategy(
        "weighted scores of other strategies, with diversity", scorers.score_hybrid, _hybrid,
        settings={**_FEATURES, "weights": {"length": 1.0}, "scores": {}, "diversity": 0.3}, ranks=False,
    ),
    # cleaning
    "exact": Strategy(
        "one of each text", _DUPLICATES["exact"], _first_of_each, settings={"normalize": True},
        optional_k=True, ranks=False,
    ),
    "minhash": Strategy(
        "one of each group of near-duplicates (Jaccard)", _DUPLICATES["minhash"], _first_of_each,
        settings=_fields(MinHash), optional_k=True, ranks=False,
    ),
    "simhash": Strategy(
        "one of each group of near-duplicates (fingerprints)", _DUPLICATES["simhash"], _first_of_each,
        settings=_fields(SimHash), optional_k=True, ranks=False,
    ),
    "rules": Strategy(
        "texts that break no rule of quality", scorers.score_rules, _from_threshold(0.0),
        settings=_fields(QualityRules), optional_k=True,
    ),
    "language": Strategy(
        "texts in the wanted languages", scorers.score_language, _from_threshold("threshold"),
        settings=_fields(Language), optional_k=True,
    ),
    # difficulty without a model
    "length": Strategy("the longest", scorers.score_length, _top),
    "rarity": Strategy("the rarest words", scorers.score_rarity, _top),
}  # fmt: skip
