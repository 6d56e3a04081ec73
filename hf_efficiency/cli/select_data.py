"""The data of `hf-efficiency select`, read as often as needed and never held whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_efficiency.selection.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Iterator

_SUFFIXES = (".txt", ".jsonl", ".parquet")


class LineFile:
    """The rows of a .txt file (its lines that are not blank) or of a .jsonl file (its objects).

    Raises:
        ValueError: while reading: a line that is no UTF-8 or no JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._json = path.suffix == ".jsonl"

    def __iter__(self) -> Iterator[Any]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"line {number} of {str(self.path)!r} is no UTF-8: {error}") from error
                yield self._object(text, number) if self._json else text.rstrip("\r\n")

    def _object(self, text: str, number: int) -> Any:
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"line {number} of {str(self.path)!r} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {str(self.path)!r} is a {type(row).__name__}; each must be an object.")
        return row


def open_data(name: str, split: str) -> Any:
    """The rows of a file, a saved dataset or one on the Hub.

    Raises:
        ValueError: there is no such file or dataset, or its kind is unknown.
        ImportError: it needs datasets, which is missing.
    """
    path = Path(name)
    if path.suffix in (".txt", ".jsonl") and path.is_file():
        return LineFile(path)
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"{name!r} is of an unknown kind; files must end in {', '.join(_SUFFIXES)}")
    if path.suffix in _SUFFIXES and not path.is_file():
        raise ValueError(f"there is no file {name!r}")
    from hf_efficiency.integrations.datasets import load_rows

    return load_rows(name, split)


def chosen_rows(data: Any, text_column: str | None) -> Iterator[tuple[int, Any, str]]:
    """Number, row and text of every row."""
    pool = Pool(data, text_column)
    i = 0
    for rows in pool.rows(1000):
        for row in rows:
            yield i, row, pool.as_text(row)
            i += 1
