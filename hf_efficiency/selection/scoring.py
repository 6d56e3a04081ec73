"""One score for each row of a pool, batch by batch, kept on disk as it grows so that a killed run goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from hf_efficiency.selection.pool import Pool

_PART_ROWS = 20_000


class ScoreCache:
    """A folder with the scores of the rows that are done, in parts of consecutive rows.

    Args:
        folder: Made if it is missing.
        key: A checksum of everything that the scores depend on; a folder of another key is refused.

    Raises:
        ValueError: the folder holds the scores of another selection.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.folder / "selection.json"
        if record.is_file():
            stored = json.loads(record.read_text(encoding="utf-8")).get("key")
            if stored != key:
                raise ValueError(
                    f"the folder {str(folder)!r} holds scores of another selection (checksum {stored}, this one is "
                    f"{key}: the strategy, its settings, the model, the target or the data differ). Choose another "
                    "folder, or remove this one."
                )
        else:
            _replace(record, lambda path: path.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8"))

    def load(self) -> NDArray[np.float32]:
        """Scores of the rows that are done, (rows,)."""
        parts = [load_file(path)["scores"] for path in sorted(self.folder.glob("scores-*.safetensors"))]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def append(self, start: int, scores: NDArray[np.float32]) -> None:
        """Keeps the scores of the rows from `start` on."""
        path = self.folder / f"scores-{start:012d}.safetensors"
        _replace(path, lambda partial: save_file({"scores": np.ascontiguousarray(scores)}, partial))


def score_pool(
    pool: Pool,
    score: Callable[[list[Any]], NDArray[np.floating]],
    *,
    rows: bool = False,
    batch_size: int = 1000,
    cache: ScoreCache | None = None,
    progress: bool = False,
    label: str = "Scoring",
) -> NDArray[np.float32]:
    """`score` of every row, (n,) float32.

    Args:
        pool: What is scored.
        score: Takes a batch of texts, or of rows if `rows`, and gives one number for each.
        rows: Hand over whole rows.
        batch_size: Rows of a batch.
        cache: Takes the scores as they come, and says which are there already.
        progress: Show a bar.
        label: Of the bar.
    """
    from tqdm import tqdm

    parts = [cache.load()] if cache is not None else []
    done = sum(map(len, parts))
    total = pool.known_length
    if total is not None and done > total:
        raise ValueError(f"the cache holds {done} scores for a pool of {total} rows: it belongs to another dataset.")
    pending: list[NDArray[np.float32]] = []
    batches = (pool.rows if rows else pool.texts)(batch_size, done)
    with tqdm(total=total, initial=done, desc=label, unit=" rows", disable=not progress) as bar:
        for batch in batches:
            scores = np.asarray(score(batch), np.float32)
            pending.append(scores)
            bar.update(len(scores))
            if sum(map(len, pending)) >= _PART_ROWS:
                done = _keep(parts, pending, done, cache)
    _keep(parts, pending, done, cache)
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def _keep(
    parts: list[NDArray[np.float32]], pending: list[NDArray[np.float32]], done: int, cache: ScoreCache | None
) -> int:
    if not pending:
        return done
    joined = np.concatenate(pending)
    pending.clear()
    parts.append(joined)
    if cache is not None:
        cache.append(done, joined)
    return done + len(joined)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(f".{path.name}.part")
    write(partial)
    os.replace(partial, path)
