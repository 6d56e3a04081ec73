"""One call of `select`: the pool, the models and the settings, and the passes over the pool that strategies ask for.

Shape legend: n rows, d features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_efficiency.selection.choosing import check_k
from hf_efficiency.selection.embedding import HashedText, normalized
from hf_efficiency.selection.hashing import hash_words
from hf_efficiency.selection.pool import Pool, texts_of
from hf_efficiency.selection.scoring import ScoreCache, score_pool
from hf_efficiency.selection.signals import inputs_of, scoring, to_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

_TEXT_BATCH = 1000
_WINDOW = 16  # batches that are sorted by length together, so that little is padded
_LENGTH_SAMPLE = 1000


@dataclass
class Run:
    """What strategies work with; `select` documents the fields."""

    pool: Pool
    settings: dict[str, Any]
    models: Sequence[nn.Module] = ()
    tokenizer: Any = None
    target: Any = None
    seed: int = 0
    batch_size: int = 8
    max_length: int = 512
    cache: ScoreCache | None = None
    progress: bool = False
    report: dict[str, Any] = field(default_factory=dict)

    def count(self, k: int | float | None) -> int:
        """The number of rows that k stands for."""
        return check_k(k, len(self.pool))

    def config(self, kind: Any) -> Any:
        """A method's dataclass made of the settings that it has fields for, and of the seed."""
        known = {**self.settings, "seed": self.seed}
        return kind(**{name: known[name] for name in kind.__dataclass_fields__ if name in known})

    def batches(self, label: str) -> Iterator[list[str]]:
        """All texts of the pool."""
        from tqdm import tqdm

        total = self.pool.known_length
        with tqdm(total=total, desc=label, unit=" rows", disable=not self.progress) as bar:
            for texts in self.pool.texts(_TEXT_BATCH):
                yield texts
                bar.update(len(texts))

    def text_scores(self, score: Callable[[list[str]], NDArray[np.floating]]) -> NDArray[np.float32]:
        """A score of each text, (n,)."""
        return score_pool(self.pool, score, batch_size=_TEXT_BATCH, cache=self.cache, progress=self.progress)

    def model_scores(self, scorers: Sequence[Callable[[Mapping[str, Tensor]], Tensor]]) -> NDArray[np.float32]:
        """The mean over the scorers, one for each model, of the score that they give each row, (n,)."""

        def score(rows: list[Any]) -> NDArray[np.floating]:
            return np.mean([self._in_order(rows, scorer) for scorer in scorers], axis=0)

        window = self.batch_size * _WINDOW
        rows = self.pool.column == "input_ids"
        with scoring_all(self.models):
            return score_pool(self.pool, score, rows=rows, batch_size=window, cache=self.cache, progress=self.progress)

    def target_texts(self) -> list[str]:
        """The texts of the target."""
        return texts_of(self.target, self.tokenizer)

    def target_batches(self) -> Iterator[dict[str, Tensor]]:
        """The target as batches for the first model."""
        pool = Pool([self.target] if isinstance(self.target, str) else self.target, tokenizer=self.tokenizer)
        yield from self._model_batches(pool, None)

    def sample_batches(self, limit: int) -> Iterator[dict[str, Tensor]]:
        """Batches of the first `limit` rows of the pool."""
        yield from self._model_batches(self.pool, limit)

    def features(self) -> NDArray[np.float32]:
        """Features of all rows, (n, d), of length one.

        `settings["features"]` is `text` (hashed tf-idf), `model` (the mean of its last hidden states) or an array.
        """
        wanted = self.settings.get("features", "text")
        if isinstance(wanted, str) and wanted == "text":
            config = HashedText(dim=self.settings.get("dim", 128))
            weights = config.weights(self.batches("Counting n-grams"))
            return np.concatenate([config.embed(texts, weights) for texts in self.batches("Embedding")])
        if isinstance(wanted, str) and wanted == "model":
            return self._model_features()
        array = np.asarray(wanted, np.float32)
        if array.ndim != 2 or len(array) != len(self.pool):
            raise ValueError(
                f"features have the shape {array.shape}; expected one row for each of {len(self.pool)} in the pool, "
                "or 'text' or 'model'."
            )
        if not np.isfinite(array).all():
            raise ValueError("features hold NaN or infinite values.")
        return normalized(array)

    def mean_words(self) -> float:
        """Words of a text on average, over the first thousand."""
        words, texts = 0, 0
        for batch in self.pool.texts(_TEXT_BATCH):
            words, texts = words + len(hash_words(batch).hashes), texts + len(batch)
            if texts >= _LENGTH_SAMPLE:
                break
        return words / max(1, texts)

    def tokenize(self, rows: list[Any]) -> list[tuple[list[int], list[int] | None]]:
        """Token ids, and labels where the row has its own, at most `max_length` of each."""
        if rows and not isinstance(rows[0], str):
            return [(list(r["input_ids"])[: self.max_length], _cut(r.get("labels"), self.max_length)) for r in rows]
        ids = self.tokenizer(rows, truncation=True, max_length=self.max_length, verbose=False)["input_ids"]
        return [(row, None) for row in ids]

    def _model_batches(self, pool: Pool, limit: int | None) -> Iterator[dict[str, Tensor]]:
        done = 0
        for rows in (pool.rows if pool.column == "input_ids" else pool.texts)(self.batch_size):
            rows = rows if limit is None else rows[: limit - done]
            done += len(rows)
            tokens = [pair for pair in self.tokenize(rows) if len(pair[0]) > 1]
            if tokens:
                yield self._batch(tokens)
            if limit is not None and done >= limit:
                return

    def _batch(self, tokens: list[tuple[list[int], list[int] | None]]) -> dict[str, Tensor]:
        device = next(self.models[0].parameters()).device
        batch = to_batch([ids for ids, _ in tokens], device)
        for i, (_, labels) in enumerate(tokens):
            if labels is not None:
                batch["labels"][i, : len(labels)] = torch.as_tensor(labels, device=device)
        return batch

    def _in_order(self, rows: list[Any], scorer: Callable[[Mapping[str, Tensor]], Tensor]) -> NDArray[np.floating]:
        tokens = self.tokenize(rows)
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i][0]))
        # a row with fewer than two tokens predicts nothing
        result = np.full(len(rows), -np.inf)
        order = [i for i in order if len(tokens[i][0]) > 1]
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            result[part] = scorer(self._batch([tokens[i] for i in part])).float().cpu().numpy()
        return result

    def _model_features(self) -> NDArray[np.float32]:
        if not self.models:
            raise ValueError("features='model' needs a model and its tokenizer.")
        parts = []
        with scoring_all(self.models[:1]):
            for batch in self._every_row():
                hidden = self.models[0](**inputs_of(batch), output_hidden_states=True).hidden_states[-1].float()
                mask = batch["attention_mask"][..., None].to(hidden.dtype)
                parts.append(((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu().numpy())
        # hidden states share a large common part, which hides how rows differ
        features = np.concatenate(parts)
        return normalized((features - features.mean(0)).astype(np.float32))

    def _every_row(self) -> Iterator[dict[str, Tensor]]:
        for rows in (self.pool.rows if self.pool.column == "input_ids" else self.pool.texts)(self.batch_size):
            yield self._batch(self.tokenize(rows))


@contextmanager
def scoring_all(models: Sequence[nn.Module]) -> Iterator[None]:
    """`scoring` of several models at once."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(scoring(model))
        yield


def _cut(labels: Any, length: int) -> list[int] | None:
    return None if labels is None else list(labels)[:length]
