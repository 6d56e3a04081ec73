"""Policies that look at no attention: by age, at random, and pinned spans on top of any other policy."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_efficiency.generation.caches.policies import Policy, protect


@dataclass
class Newest(Policy):
    """The newest tokens stay."""

    def begin(self, ranks: Tensor, shape: tuple[int, int, int], layer: int) -> Tensor:
        """The place in the text."""
        return ranks.float().unsqueeze(1).expand(shape)


@dataclass
class RandomTokens(Policy):
    """Any tokens stay: what every other policy must beat.

    Attributes:
        seed: Of the draw, which is a function of seed, layer, head and the token's place alone.
    """

    seed: int = 0

    def begin(self, ranks: Tensor, shape: tuple[int, int, int], layer: int) -> Tensor:
        """A pseudo-random number of each head and token, the same in a batch as alone."""
        heads = torch.arange(shape[1], device=ranks.device).view(1, -1, 1) + (layer + 1) * 7919 + self.seed * 104729
        mixed = (ranks.unsqueeze(1) + 1) * 2654435761 ^ heads * 40503
        for shift, factor in ((16, 0x45D9F3B), (16, 0x45D9F3B), (16, 1)):
            mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
        return mixed.float() / 2**32


@dataclass
class Pinned(Policy):
    """Spans of the text that never leave; another policy chooses among the rest.

    Attributes:
        spans: (start, end) in tokens of each row's own text, padding not counted.
        inner: The other policy.
    """

    spans: list[tuple[int, int]] = field(default_factory=list)
    inner: Policy = field(default_factory=Newest)

    def __post_init__(self) -> None:
        self.recent = self.inner.recent
        self.evicts_while_decoding = self.inner.evicts_while_decoding
        for start, end in self.spans:
            if not 0 <= start < end:
                raise ValueError(f"The pinned span ({start}, {end}) is empty or negative: give 0 <= start < end.")

    def scored_queries(self, t: int, prompt: bool) -> int:
        """As the inner policy."""
        return self.inner.scored_queries(t, prompt)

    def begin(self, ranks: Tensor, shape: tuple[int, int, int], layer: int) -> Tensor:
        """Infinity for what is pinned."""
        kept = torch.zeros_like(ranks, dtype=torch.bool)
        for start, end in self.spans:
            kept |= (ranks >= start) & (ranks < end)
        return protect(self.inner.begin(ranks, shape, layer), kept.unsqueeze(1))

    def observe(self, scores: Tensor, sums: Tensor, positions: Tensor, newest: int, prompt: bool) -> Tensor:
        """As the inner policy."""
        seen = self.inner.observe(torch.where(scores.isinf(), 0.0, scores), sums, positions, newest, prompt)
        return protect(seen, scores.isinf())

    @property
    def pinned(self) -> int:
        """Tokens that the spans hold."""
        return len({place for start, end in self.spans for place in range(start, end)})

    def recent_tokens(self, capacities: list[int]) -> list[int]:
        """What the pinned tokens leave."""
        free = [max(0, capacity - self.pinned) for capacity in capacities]
        return [min(tokens, left) for tokens, left in zip(self.inner.recent_tokens(free), free, strict=True)]
