"""How each strategy scores: all rows of a pool, or, for those that ask a model, any batch of a training run.

Shape legend: b examples of a batch, n rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_efficiency.selection.classifier import QualityClassifier
from hf_efficiency.selection.curriculum import length_difficulty, rarity_difficulty, word_counts
from hf_efficiency.selection.dsir import DSIR
from hf_efficiency.selection.el2n import el2n, grand
from hf_efficiency.selection.exact import exact_clusters
from hf_efficiency.selection.hybrid import combined
from hf_efficiency.selection.influence import GradientFeatures, directions, influence, target_features
from hf_efficiency.selection.language import Language
from hf_efficiency.selection.medu import MEDU
from hf_efficiency.selection.minhash import MinHash
from hf_efficiency.selection.perplexity import perplexity
from hf_efficiency.selection.quality_rules import QualityRules
from hf_efficiency.selection.signals import example_signal
from hf_efficiency.selection.simhash import SimHash
from hf_efficiency.selection.uncertainty import bald, entropy, variation_ratio

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from hf_efficiency.selection.run import Run

Batch = Mapping[str, Any]
BatchScorer = Callable[[Batch], Any]  # to scores (b,)


@dataclass(frozen=True)
class Context:
    """What a scorer of batches may use besides the model.

    Attributes:
        settings: Of the strategy.
        target: Batches of the target.
        sample: Batches of the pool, so many rows of it.
    """

    settings: Mapping[str, Any]
    target: Callable[[], Iterable[Batch]] | None = None
    sample: Callable[[int], Iterable[Batch]] | None = None


def simple(function: Callable[..., Tensor], *names: str) -> Callable[[nn.Module, Context], BatchScorer]:
    """A scorer of batches from a function of a model and a batch, which takes the named settings."""

    def make(model: nn.Module, context: Context) -> BatchScorer:
        return partial(function, model, **{name: context.settings[name] for name in names})

    return make


def influence_scorer(model: nn.Module, context: Context) -> BatchScorer:
    """Alignment with the target's gradient, after a look at the target and a sample of the pool."""
    settings = context.settings
    if context.target is None or context.sample is None:
        raise ValueError("the strategy 'influence' needs target=, examples of what the model should learn.")
    gradients = GradientFeatures(settings["rank"], settings["max_layers"])
    target = target_features(gradients, model, context.target())
    sample = target_features(gradients, model, context.sample(settings["sample"]), settings["sample"])
    along = directions(settings["method"], target, sample, settings["damping"], settings["groups"])
    return lambda batch: influence(gradients(model, batch), along)


_LOSS = simple(partial(example_signal, name="loss"))

BATCH_SCORERS: dict[str, Callable[[nn.Module, Context], BatchScorer]] = {
    "perplexity": simple(perplexity),
    "loss": _LOSS,
    "el2n": simple(el2n),
    "grand": simple(grand),
    "d2": _LOSS,
    "influence": influence_scorer,
    "entropy": simple(entropy),
    "variation-ratio": simple(variation_ratio),
    "bald": simple(bald, "passes", "dropout"),
}


def score_by_model(name: str, run: Run) -> NDArray[np.float32]:
    """Scores of a pool by one of `BATCH_SCORERS`, averaged over the models."""
    target = None if run.target is None else run.target_batches
    context = Context(run.settings, target, run.sample_batches)
    return run.model_scores([BATCH_SCORERS[name](model, context) for model in run.models])


def score_dsir(run: Run) -> NDArray[np.float32]:
    """Mean log-ratio of each text's n-grams."""
    config = run.config(DSIR)
    target = config.count([run.target_texts()])
    pool = config.count(run.batches("Counting n-grams"))
    run.report["ngrams_per_text"] = float(pool.sum() / len(run.pool))
    log_ratio = config.log_ratio(target, pool)
    return run.text_scores(lambda texts: config.score(texts, log_ratio))


def score_classifier(run: Run) -> NDArray[np.float32]:
    """Probability of being like the target, from a classifier that did not have the text as a negative example.

    The texts fall into two folds by their hash; each is scored by the model whose negatives are of the other fold.
    """
    config = run.config(QualityClassifier)
    positive = run.target_texts()
    known, wanted = set(positive), config.negatives * len(positive)
    generator = np.random.default_rng(config.seed)
    folds: tuple[list[str], list[str]] = ([], [])
    seen = [0, 0]
    for texts in run.batches("Drawing examples"):
        for text in texts:
            if text in known or not text.strip():
                continue
            fold = fold_of(text)
            seen[fold] += 1
            if len(folds[fold]) < wanted:
                folds[fold].append(text)
            elif (place := int(generator.integers(seen[fold]))) < wanted:
                folds[fold][place] = text
    both = [*folds[0], *folds[1]]
    models = [config.fit(positive, folds[1 - fold] or both) for fold in (0, 1)]
    run.report["trained_on"] = {"good": len(positive), "others": len(both)}

    def score(texts: list[str]) -> NDArray[np.float32]:
        choices = np.stack([config.score(texts, model) for model in models])
        return choices[[fold_of(text) for text in texts], np.arange(len(texts))]

    return run.text_scores(score)


def fold_of(text: str) -> int:
    """0 or 1, as good as at random and always the same for a text."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) & 1


def score_rules(run: Run) -> NDArray[np.float32]:
    """Minus the number of broken rules."""
    config = run.config(QualityRules)
    broken: dict[str, int] = {}

    def score(texts: list[str]) -> NDArray[np.float32]:
        found = [config.broken(text) for text in texts]
        for name in (name for names in found for name in names):
            broken[name] = broken.get(name, 0) + 1
        return np.array([-len(names) for names in found], np.float32)

    scores = run.text_scores(score)
    run.report["broken_rules"] = dict(sorted(broken.items(), key=lambda item: -item[1]))
    return scores


def score_language(run: Run) -> NDArray[np.float32]:
    """Probability of the wanted languages."""
    config = run.config(Language)
    identifier = config.identifier()
    return run.text_scores(lambda texts: config.score(texts, identifier))


def score_medu(run: Run) -> NDArray[np.float32]:
    """Utility that the model expects of each text."""
    if not run.settings["task"]:
        raise ValueError("the strategy 'medu' needs task=, a sentence on what the model is to be good at.")
    config = MEDU(run.settings["task"], max_characters=run.settings["max_characters"])
    config.grade_tokens(run.tokenizer)
    return run.text_scores(lambda texts: config.score(texts, run.models[0], run.tokenizer))


def score_length(run: Run) -> NDArray[np.float32]:
    """Words of each text."""
    return run.text_scores(length_difficulty)


def score_rarity(run: Run) -> NDArray[np.float32]:
    """How rare the words of each text are."""
    counts = word_counts(run.batches("Counting words"))
    return run.text_scores(lambda texts: rarity_difficulty(texts, counts))


def score_duplicates(kind: str, run: Run) -> NDArray[np.float64]:
    """The first row of each row's cluster of duplicates."""
    batches = run.batches("Looking for duplicates")
    if kind == "exact":
        clusters = exact_clusters(batches, normalize=run.settings["normalize"])
    else:
        clusters = run.config(MinHash if kind == "minhash" else SimHash).clusters(batches)
    return clusters.labels().astype(np.float64)  # float64 holds every row number exactly


def score_hybrid(run: Run) -> NDArray[np.float32]:
    """Weighted ranks of the scores that the weights name: given ones, or those of other strategies."""
    from hf_efficiency.selection.strategies import STRATEGIES, check_needs

    weights, given = run.settings["weights"], run.settings["scores"]
    parts = {}
    for name in weights:
        if name in given:
            parts[name] = np.asarray(given[name], np.float64)
            if len(parts[name]) != len(run.pool):
                raise ValueError(f"scores[{name!r}] has {len(parts[name])} values for a pool of {len(run.pool)} rows.")
            continue
        strategy = STRATEGIES.get(name)
        if strategy is None or not strategy.ranks:
            named = ", ".join(key for key, row in STRATEGIES.items() if row.ranks)
            raise ValueError(f"weights name {name!r}: pass its values in scores=, or name one of {named}.")
        check_needs(name, run.models, run.tokenizer, run.target)
        inner = replace(run, settings={**strategy.settings}, cache=None, report={})
        parts[name] = strategy.score(inner).astype(np.float64)
    return combined(parts, weights).astype(np.float32)
