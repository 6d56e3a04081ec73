"""Drafts copied from the text itself (prompt lookup, Saxena 2023): what followed the same words before.

Of all earlier places, the one whose last tokens agree with the text's end over the longest stretch is taken, and of
equally long ones the latest.
"""

from collections.abc import Sequence

from torch import Tensor

from hf_efficiency.generation.speculative.draft import Draft, Scorer


class LookupDrafter:
    """Prompt lookup with an index of the text that grows with it.

    Args:
        min_ngram: Fewest tokens that must agree.
        max_ngram: Most that are compared.

    Raises:
        ValueError: Lengths that are no range.
    """

    free = True

    def __init__(self, min_ngram: int = 2, max_ngram: int = 8) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(
                f"min_ngram is {min_ngram} and max_ngram {max_ngram}: give at least 1, and the smaller one first."
            )
        self.min_ngram, self.max_ngram = min_ngram, max_ngram
        self._indices: list[_Index] = []

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Forgets earlier texts; padding is not looked up."""
        b = input_ids.shape[0]
        pads = [0] * b if attention_mask is None else (attention_mask == 0).sum(1).tolist()
        self._indices = [_Index(self.min_ngram, self.max_ngram, pad) for pad in pads]

    def propose(self, rows: Sequence[Sequence[int]], branching: tuple[int, ...], scorer: Scorer) -> Draft | None:
        """What followed the longest agreement. Its `strength` is the shortest agreement of any row."""
        found = [index.find(row, len(branching)) for index, row in zip(self._indices, rows, strict=True)]
        if not any(tokens for tokens, _ in found):
            return None
        strength = min(agreed for tokens, agreed in found if tokens)
        return Draft.chains([tokens for tokens, _ in found], scorer.device, strength)


class _Index:
    """Where each n-gram of the shortest length ended, of one row."""

    def __init__(self, shortest: int, longest: int, pad: int) -> None:
        self.shortest, self.longest, self.start = shortest, longest, pad
        self.ends: dict[tuple[int, ...], list[int]] = {}
        self.done = pad + shortest  # the next end to be indexed

    def find(self, row: Sequence[int], count: int) -> tuple[list[int], int]:
        """Up to `count` tokens that followed, and how many tokens agreed."""
        for end in range(self.done, len(row)):  # the end of the text itself is no earlier place
            self.ends.setdefault(tuple(row[end - self.shortest : end]), []).append(end)
        self.done = max(self.done, len(row))
        best, place = 0, 0
        if len(row) - self.start > self.shortest:
            for end in reversed(self.ends.get(tuple(row[-self.shortest :]), [])):
                agreed = self._agreed(row, end)
                if agreed > best:
                    best, place = agreed, end
                if best == self.longest:
                    break
        if not best:
            return [], 0
        period = len(row) - place  # a text that repeats itself goes on doing so
        return [row[place + i % period] for i in range(count)], best

    def _agreed(self, row: Sequence[int], end: int) -> int:
        agreed, most = self.shortest, min(self.longest, end - self.start)
        while agreed < most and row[end - 1 - agreed] == row[len(row) - 1 - agreed]:
            agreed += 1
        return agreed
