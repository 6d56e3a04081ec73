"""Storage of an evicting cache: slots that each head fills with tokens of its own.

A slot that was evicted is written over by the next token, so decoding neither copies the cache nor allocates. Attention
does not care about the order of keys; a slot's position says which token it holds.

Shape legend: b batch, h query heads, k key-value heads, n slots, t new tokens, s tokens seen, d head size.
"""

import torch
from torch import Tensor

# Position of an empty slot.
EMPTY = -1


class Slots:
    """Keys and values of the tokens that are kept, per row and head.

    Attributes:
        keys: (b, k, n, d).
        values: (b, k, n, d_v).
        positions: (b, k, n) int32, the token's place among all tokens seen; -1 for an empty slot.
        scores: (b, k, n) float32, by which an eviction policy chooses.
        lengths: (b,) int64, real tokens seen, padding left out.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Empty, for tokens like those of keys and values."""
        b, k = keys.shape[:2]
        self.keys = keys.new_empty(b, k, 0, keys.shape[3])
        self.values = values.new_empty(b, k, 0, values.shape[3])
        self.positions = torch.empty(b, k, 0, dtype=torch.int32, device=keys.device)
        self.scores = torch.empty(b, k, 0, dtype=torch.float32, device=keys.device)
        self.lengths = torch.zeros(b, dtype=torch.int64, device=keys.device)

    @property
    def size(self) -> int:
        """Slots of a head, empty ones included."""
        return self.positions.shape[2]

    @property
    def alive(self) -> Tensor:
        """(b, k, n): which slots hold a token."""
        return self.positions >= 0

    def insert(self, keys: Tensor, values: Tensor, start: int, free: int) -> Tensor:
        """Puts new tokens into empty slots, and into new slots where these don't suffice.

        Args:
            keys: (b, k, t, d).
            values: (b, k, t, d_v).
            start: Position of the first of them.
            free: Slots that are known to be empty in every head.

        Returns:
            Their slots (b, k, t).
        """
        b, k, t = keys.shape[:3]
        positions = torch.arange(start, start + t, dtype=torch.int32, device=keys.device).expand(b, k, t)
        if free < t:
            n, more = self.size, t - free
            self._append(more, keys, values, positions)
            if free == 0:
                return torch.arange(n, n + t, device=keys.device).expand(b, k, t)
        if t == 1:
            index = (~self.alive).int().argmax(2, keepdim=True)
        else:
            index = self.alive.int().argsort(dim=2, stable=True)[:, :, :t].sort(2).values
        self.keys.scatter_(2, index[..., None].expand_as(keys), keys)
        self.values.scatter_(2, index[..., None].expand_as(values), values)
        self.positions.scatter_(2, index, positions)
        self.scores.scatter_(2, index, 0.0)
        return index

    def _append(self, more: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """`more` slots at the end: the tokens themselves where all of them go there, else empty ones."""
        whole = more == keys.shape[2]
        self.keys = torch.cat((self.keys, keys if whole else torch.zeros_like(keys[:, :, :more])), 2)
        self.values = torch.cat((self.values, values if whole else torch.zeros_like(values[:, :, :more])), 2)
        added = positions if whole else torch.full_like(positions[:, :, :more], EMPTY)
        self.positions = torch.cat((self.positions, added), 2)
        self.scores = torch.cat((self.scores, torch.zeros_like(added, dtype=torch.float32)), 2)

    def keep(self, kept: Tensor) -> None:
        """Empties all slots but those in kept (b, k, n)."""
        self.positions = torch.where(kept, self.positions, EMPTY)

    def compact(self, size: int) -> None:
        """Gives the memory of all but `size` slots back; the tokens that stay are sorted by position.

        Args:
            size: At least the number of tokens of every head.
        """
        order = self.positions.argsort(dim=2, stable=True)[:, :, self.size - size :]
        self.keys = self.keys.gather(2, order[..., None].expand(-1, -1, -1, self.keys.shape[3]))
        self.values = self.values.gather(2, order[..., None].expand(-1, -1, -1, self.values.shape[3]))
        self.positions, self.scores = self.positions.gather(2, order), self.scores.gather(2, order)

    def select(self, rows: Tensor) -> None:
        """Takes the batch's rows in this order, for beams."""
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.index_select(0, rows))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: what is saved, and what takes memory."""
        names = ("keys", "values", "positions", "scores", "lengths")
        return {name: getattr(self, name) for name in names}


def slot_mask(mask: Tensor | None, positions: Tensor, first: int, t: int) -> Tensor:
    """A mask over all tokens ever seen, as a mask over slots.

    Args:
        mask: (b or 1, 1 or h, t, s), boolean (True: attend) or additive; None for a causal one without padding.
        positions: (b, k, n) of the slots.
        first: Position of the first query.
        t: Queries.

    Returns:
        (b, k or h, t, n), boolean or additive as given; empty slots are hidden.
    """
    b, _, n = positions.shape
    place = positions.long().unsqueeze(2)
    if mask is None:
        queries = torch.arange(first, first + t, device=positions.device).view(1, 1, t, 1)
        return (place <= queries) & (place >= 0)
    if mask.shape[1] > 1:
        place = for_heads(place, mask.shape[1])
    heads = place.shape[1]
    found = mask.expand(b, heads, t, mask.shape[3]).gather(3, place.clamp(min=0).expand(b, heads, t, n))
    return narrowed(found, place >= 0)


def narrowed(mask: Tensor, shown: Tensor) -> Tensor:
    """A mask, boolean or additive, that also hides what is not shown."""
    return mask & shown if mask.dtype == torch.bool else torch.where(shown, mask, torch.finfo(mask.dtype).min)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as one that is added to logits."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def for_heads(mask: Tensor, heads: int) -> Tensor:
    """A mask or the like (b, k, ...) of key-value heads as one of so many query heads (b, h, ...)."""
    return mask if mask.shape[1] == heads else mask.repeat_interleave(heads // mask.shape[1], 1)


def ever_attended(mask: Tensor, positions: Tensor) -> Tensor:
    """Which slots (b, k, n) any query of a mask (b or 1, 1 or h, t, s) sees: empty ones and padding are left out."""
    seen = attended(mask).any(2)
    if seen.shape[1] > 1:
        seen = seen.view(seen.shape[0], positions.shape[1], -1, seen.shape[2]).any(2)
    seen = seen.expand(*positions.shape[:2], seen.shape[2])
    return seen.gather(2, positions.long().clamp(min=0)) & (positions >= 0)


def attended(mask: Tensor) -> Tensor:
    """Which entries of a mask, boolean or additive, are open."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def parents_of(mask: Tensor | None, first: int, t: int) -> tuple[list[int], list[int]]:
    """The tree that the last t tokens form under a mask, from the first row and head.

    Args:
        mask: (b or 1, 1 or h, t, s), boolean or additive, each token seeing its ancestors; None for a chain.
        first: Position of the first of the t tokens.
        t: Tokens.

    Returns:
        Of each token its parent, -1 for none among them, and its depth, 0 for a token without a parent.
    """
    if mask is None or t == 1:
        return list(range(-1, t - 1)), list(range(t))
    sees = attended(mask[0, 0, :, first:]).tolist()
    parents = [max((j for j in range(i) if sees[i][j]), default=-1) for i in range(t)]
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return parents, depths
