"""The rows being written: their tokens, how the host scores the next ones, and where it stops.

Shape legend: b rows, n tokens or nodes, v tokens of the vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# The host's own processors score each row by itself, but for this one.
_BY_ROW_NUMBER = "PrefixConstrainedLogitsProcessor"


class Rows:
    """Token ids of each row, of different lengths, prompts included."""

    def __init__(self, input_ids: Tensor) -> None:
        self.lists: list[list[int]] = input_ids.tolist()
        self._buffer = input_ids.clone()
        self.prompt = input_ids.shape[1]

    def text(self, row: int, added: Sequence[int] = ()) -> Tensor:
        """A row's ids (n,), with more at its end."""
        base = self._buffer[row, : len(self.lists[row])]
        return base if not added else torch.cat((base, base.new_tensor(added)))

    def append(self, row: int, tokens: Sequence[int]) -> None:
        """Adds to a row."""
        start = len(self.lists[row])
        end = start + len(tokens)
        if end > self._buffer.shape[1]:
            more = self._buffer.new_zeros(self._buffer.shape[0], max(64, self._buffer.shape[1]))
            self._buffer = torch.cat((self._buffer, more), 1)
        self.lists[row] += tokens
        self._buffer[row, start:end] = self._buffer.new_tensor(tokens)

    def stacked(self, pad: int) -> Tensor:
        """All rows (b, longest), padded on the right."""
        most = max(len(row) for row in self.lists)
        return self._buffer.new_tensor([[*row, *[pad] * (most - len(row))] for row in self.lists])


class Scores:
    """The host's logits processors, on rows of different lengths and on several tokens of each.

    What a processor is given is what it would be given in plain generation: all ids of the row before the token, and
    its logits in float32.
    """

    def __init__(self, processors: Any, rows: int) -> None:
        self.processors, self.rows = processors, rows
        self.alone = any(
            type(one).__name__ == _BY_ROW_NUMBER or not type(one).__module__.startswith("transformers.")
            for one in processors
        )

    def __call__(self, numbers: Sequence[int], prefixes: Sequence[Tensor], logits: Tensor) -> Tensor:
        """Scores (n, v) of logits (n, v), each after its prefix (ids of the row of that number)."""
        logits = logits.to(torch.float32, copy=True)
        if not len(self.processors):
            return logits
        out = torch.empty_like(logits)
        if self.alone and self.rows > 1:
            for i, (number, prefix) in enumerate(zip(numbers, prefixes, strict=True)):
                ids, copies = prefix.expand(self.rows, -1), logits[i].expand(self.rows, -1).clone()
                out[i] = self.processors(ids, copies)[number]
            return out
        groups: dict[int, list[int]] = {}
        for i, prefix in enumerate(prefixes):
            groups.setdefault(i if self.alone else len(prefix), []).append(i)
        for members in groups.values():
            ids = torch.stack([prefixes[i] for i in members])
            out[members] = self.processors(ids, logits[members])
        return out


class Stops:
    """The host's stopping criteria, asked after each token as plain generation does."""

    def __init__(self, criteria: Any) -> None:
        self.criteria = criteria

    def first(self, rows: Rows, row: int, added: Sequence[int], scores: Any = None) -> int | None:
        """How many of the added tokens are written before the row ends; None if it goes on."""
        whole = rows.text(row, added)
        for count in range(1, len(added) + 1):
            if bool(self.criteria(whole[: len(whole) - len(added) + count][None], scores).any()):
                return count
        return None
