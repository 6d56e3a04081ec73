"""A pool of training examples, whatever holds them, read in batches and as often as needed.

Nothing here keeps more than one batch, so that the pool may be larger than memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

TEXT_COLUMNS = ("text", "content", "document", "messages", "prompt", "instruction", "input_ids")
_TAILS = {"prompt": "completion", "instruction": "output"}  # what follows the text of a column, where it is there


class Pool:
    """Rows of a dataset as texts or as they are.

    Args:
        dataset: Texts in a list or in anything that can be iterated over more than once; rows that are mappings; a
            `datasets.Dataset` (one split) or `IterableDataset`; or a dataset with `__len__` and `__getitem__`.
        text_column: Where the text of a row is. By default the first of `text`, `content`, `document`, `messages`
            (joined), `prompt` (with `completion`), `instruction` (with `output`), or `input_ids` (decoded).
        tokenizer: Decodes rows that hold nothing but token ids.

    Raises:
        TypeError: the dataset can be read only once, or is one text.
        ValueError: it is empty, or has no column of text.
    """

    def __init__(self, dataset: Any, text_column: str | None = None, tokenizer: Any = None) -> None:
        if isinstance(dataset, str | bytes):
            raise TypeError("the dataset is one text; put texts in a list, or read a file with `read_file`.")
        if isinstance(dataset, Mapping):
            raise ValueError(f"the dataset has the splits {list(dataset)}; choose one, such as dataset['train'].")
        if not isinstance(dataset, Iterable) and not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise TypeError(f"the dataset is a {type(dataset).__name__}, which is neither a sequence nor iterable.")
        if isinstance(dataset, Iterable) and iter(dataset) is dataset:
            raise TypeError(
                "the dataset is an iterator, which can be read only once: give a list, a datasets.Dataset, or an "
                "object whose __iter__ starts anew."
            )
        self.dataset = dataset
        self.tokenizer = tokenizer
        self._length: int | None = len(dataset) if hasattr(dataset, "__len__") else None
        first = next(self.rows(1), None)
        if first is None:
            raise ValueError("the dataset is empty: give at least one example.")
        self.column = _column(first[0], text_column)

    @property
    def known_length(self) -> int | None:
        """Rows, or None before a stream has been read once."""
        return self._length

    def __len__(self) -> int:
        """Rows; a stream of unknown length is read once to count them."""
        if self._length is None:
            self._length = sum(len(batch) for batch in self.rows(1000))
        return self._length

    def rows(self, batch_size: int, start: int = 0) -> Iterator[list[Any]]:
        """Batches of rows, from row `start` on."""
        data = self.dataset
        if isinstance(data, list | tuple):
            for i in range(start, len(data), batch_size):
                yield list(data[i : i + batch_size])
        elif hasattr(data, "column_names") and self._indexed:
            for i in range(start, len(data), batch_size):
                columns = data[i : min(i + batch_size, len(data))]
                names = list(columns)
                yield [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        else:
            yield from self._iterated(batch_size, start)

    def texts(self, batch_size: int = 1000, start: int = 0) -> Iterator[list[str]]:
        """Batches of texts, from row `start` on.

        Raises:
            TypeError: a row holds something else.
        """
        data, column = self.dataset, self.column
        if hasattr(data, "column_names") and self._indexed and column not in (*_TAILS, None):
            # only the one column is read
            values = data.select_columns([column]) if hasattr(data, "select_columns") else data
            for i in range(start, len(data), batch_size):
                batch = values[i : min(i + batch_size, len(data))][column]
                yield [self.as_text({column: value}) for value in batch]
            return
        for batch in self.rows(batch_size, start):
            yield [self.as_text(row) for row in batch]

    def spot_checks(self) -> list[str]:
        """A few rows from all over the pool, or the first of a stream, to tell one pool from another."""
        data = self.dataset
        if self.known_length is None or not self._indexed:
            rows = next(self.rows(8))
        else:
            rows = [data[i] for i in sorted({i * (self.known_length - 1) // 15 for i in range(16)})]
        return [repr(row if self.column is None else row[self.column]) for row in rows]

    def _iterated(self, batch_size: int, start: int) -> Iterator[list[Any]]:
        data = self.dataset
        if isinstance(data, Iterable) and not (isinstance(data, Sequence) or self._indexed):
            rows = iter(data.skip(start)) if start and hasattr(data, "skip") else islice(iter(data), start, None)
        else:
            rows = (data[i] for i in range(start, len(data)))
        while batch := list(islice(rows, batch_size)):
            yield batch

    @property
    def _indexed(self) -> bool:
        return hasattr(self.dataset, "__getitem__") and hasattr(self.dataset, "__len__")

    def as_text(self, row: Any) -> str:
        """The text of a row.

        Raises:
            TypeError: it has none.
        """
        if isinstance(row, str):
            return row
        if not isinstance(row, Mapping) or self.column is None or self.column not in row:
            raise TypeError(f"a row is a {type(row).__name__} without {self.column!r}; rows must look like the first.")
        value = row[self.column]
        if self.column == "input_ids":
            if self.tokenizer is None:
                raise ValueError(
                    "the dataset holds token ids and no text: give the tokenizer that wrote them (tokenizer=...)."
                )
            return str(self.tokenizer.decode(value, skip_special_tokens=True))
        if isinstance(value, str):
            tail = row.get(_TAILS.get(self.column, ""), "")
            return f"{value}\n{tail}" if isinstance(tail, str) and tail else value
        if isinstance(value, Sequence):  # a conversation
            turns = (turn.get("content") for turn in value if isinstance(turn, Mapping))
            return "\n".join(str(content) for content in turns if content)
        raise TypeError(f"the column {self.column!r} holds a {type(value).__name__} where a text was expected.")


def texts_of(target: Any, tokenizer: Any = None, what: str = "target") -> list[str]:
    """The texts of a small dataset, all at once.

    Raises:
        ValueError: it is empty, or holds only empty texts.
    """
    if isinstance(target, str):
        target = [target]
    try:
        texts = [text for batch in Pool(target, tokenizer=tokenizer).texts() for text in batch if text.strip()]
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    if not texts:
        raise ValueError(f"{what} holds only empty texts: give at least one that is not.")
    return texts


def checksum(*parts: Any) -> str:
    """Twelve hexadecimal digits that change with any of the parts."""
    digest = hashlib.blake2b(digest_size=6)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"\x00")
    return digest.hexdigest()


def _column(row: Any, text_column: str | None) -> str | None:
    if isinstance(row, str):
        return None
    if not isinstance(row, Mapping):
        raise TypeError(f"a row of the dataset is a {type(row).__name__}; rows must be texts or mappings with a text.")
    names = list(row)
    if text_column is not None:
        if text_column not in row:
            raise ValueError(f"the dataset has the columns {names}, none of them {text_column!r}.")
        return text_column
    found = next((name for name in TEXT_COLUMNS if name in row), None)
    if found is None:
        raise ValueError(f"the dataset has the columns {names}; name the one with the text (text_column=...).")
    return found
