"""StreamingLLM (Xiao et al. 2024): the first tokens as attention sinks, and a ring buffer of the newest.

Query i sees key j where j is a sink or i - j < window, counted in a row's own text. That holds inside a prompt too, so
that it makes no difference how the tokens are cut into calls.

Shape legend: b batch, k key-value heads, s sinks, w window, t new tokens, m tokens that wait, d head size.
"""

import torch
from torch import Tensor

EMPTY = -1


class Ring:
    """Constant memory for s sinks and the w newest tokens.

    Slots 0 to s - 1 hold each row's sinks, the others the token of position p at slot s + p mod w.

    Attributes:
        keys: (b, k, s + w, d). The sinks' are rotated to where the last query saw them.
        values: (b, k, s + w, d_v).
        sinks: (b, k, s, d), the sinks' keys as they came.
        positions: (b, s + w) int64, the place among all tokens fed; -1 for an empty slot.
        ranks: (b, s + w) int64, the place in the row's own text, padding left out; -1 for padding and empty slots.
        lengths: (b,) int64, real tokens of each row so far.
    """

    def __init__(self, keys: Tensor, values: Tensor, sinks: int, window: int) -> None:
        """Empty, for tokens like those of keys and values."""
        b, k, _, d = keys.shape
        self.window = window
        self.keys = keys.new_zeros(b, k, sinks + window, d)
        self.values = values.new_zeros(b, k, sinks + window, values.shape[3])
        self.sinks = keys.new_zeros(b, k, sinks, d)
        self.positions = torch.full((b, sinks + window), EMPTY, device=keys.device)
        self.ranks = self.positions.clone()
        self.lengths = torch.zeros(b, dtype=torch.int64, device=keys.device)
        self._sinks_came = sinks == 0

    @property
    def count(self) -> int:
        """Sinks."""
        return self.sinks.shape[2]

    def write(self, keys: Tensor, values: Tensor, start: int, real: Tensor) -> None:
        """Stores tokens for good, over the oldest ones.

        Args:
            keys: (b, k, t, d).
            values: (b, k, t, d_v).
            start: Position of the first.
            real: (b, t) whether a token is one, and no padding.
        """
        t, s, w = keys.shape[2], self.count, self.window
        ranks = self.rank(real)
        place = torch.arange(start, start + t, device=keys.device)
        if not self._sinks_came:
            self._write_sinks(keys, values, place, ranks)
        self.lengths += real.sum(1)
        kept = slice(max(0, t - w), t)
        slots = s + place[kept] % w
        self.keys[:, :, slots] = keys[:, :, kept]
        self.values[:, :, slots] = values[:, :, kept]
        self.positions[:, slots] = place[kept]
        self.ranks[:, slots] = ranks[:, kept]

    def rank(self, real: Tensor) -> Tensor:
        """Ranks (b, t) of the next tokens; -1 for padding."""
        return torch.where(real, self.lengths.unsqueeze(1) + real.long().cumsum(1) - 1, EMPTY)

    def _write_sinks(self, keys: Tensor, values: Tensor, place: Tensor, ranks: Tensor) -> None:
        for row, token in ((ranks >= 0) & (ranks < self.count)).nonzero().tolist():
            slot = int(ranks[row, token])
            self.keys[row, :, slot] = self.sinks[row, :, slot] = keys[row, :, token]
            self.values[row, :, slot] = values[row, :, token]
            self.positions[row, slot], self.ranks[row, slot] = place[token], slot
        self._sinks_came = bool((self.ranks[:, : self.count] >= 0).all())

    def held_ranks(self) -> Tensor:
        """(b, s + w): `ranks`, but -1 for a sink's second copy, in the window."""
        is_sink_slot = torch.arange(self.keys.shape[2], device=self.keys.device) < self.count
        return torch.where(is_sink_slot | (self.ranks >= self.count), self.ranks, EMPTY)

    def select(self, rows: Tensor) -> None:
        """Takes the batch's rows in this order."""
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.index_select(0, rows))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: what is saved, and what takes memory."""
        names = ("keys", "values", "sinks", "positions", "ranks", "lengths")
        return {name: getattr(self, name) for name in names}


def visible(queries: Tensor, ranks: Tensor, sinks: int, window: int) -> Tensor:
    """Which keys the rule shows to which queries.

    Args:
        queries: (b, t) ranks of the queries.
        ranks: (b, n) ranks of the keys.
        sinks: First tokens that all queries see.
        window: Newest tokens that a query sees, itself included.

    Returns:
        (b, 1, t, n).
    """
    distance = queries.unsqueeze(2) - ranks.unsqueeze(1)
    rank = ranks.unsqueeze(1)
    return ((rank >= 0) & ((rank < sinks) | (distance < window))).unsqueeze(1)


def sink_shift(queries: Tensor, sinks: int, window: int) -> Tensor:
    """By how many positions the sinks move towards queries of these ranks.

    Positions are those within the cache (section 3.2): the sinks stand right before the window, however many tokens
    left between the two.
    """
    return (queries - (sinks + window - 1)).clamp(min=0)
