"""What a drafter gives, and what it is asked.

Shape legend: b rows, n drafted tokens, m rows of draft distributions, v tokens of the vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draft:
    """Drafted tokens of all rows.

    Attributes:
        tokens: (b, n) int64; a negative one is none, and ends its chain.
        parents: Of each token: -1 for those that follow the text, else an earlier token; None for a chain.
        probs: (b, m, v) float32, row 0 what the text's followers were drawn from, row i + 1 those of token i; None if
            nothing was drawn, so that each token had probability 1.
        strength: Where some drafts are better than others: how many tokens of the text speak for this one; else 0.
            Rates of acceptance are kept apart by it.
    """

    tokens: Tensor
    parents: list[int] | None = None
    probs: Tensor | None = None
    strength: int = 0

    @staticmethod
    def chains(tokens: Sequence[Sequence[int]], device: torch.device | str, strength: int = 0) -> "Draft":
        """Chains of different lengths, not drawn by chance."""
        n = max((len(row) for row in tokens), default=0)
        padded = [[*row, *[-1] * (n - len(row))] for row in tokens]
        return Draft(torch.tensor(padded, dtype=torch.int64, device=device).reshape(len(tokens), n), strength=strength)

    def shortened(self, n: int) -> "Draft":
        """The first n tokens of a chain."""
        probs = None if self.probs is None else self.probs[:, :n]
        return replace(self, tokens=self.tokens[:, :n], probs=probs)


@dataclass(frozen=True)
class Scorer:
    """How the target chooses, which a draft does well to imitate.

    Attributes:
        greedy: Whether it takes the best token; else it draws from the softmax of its scores.
        scores: Takes the rows' numbers, what comes before each token to be scored (a list of 1-D tensors) and logits
            (n, v), and gives scores (n, v) in float32, as the logits processors make them.
        vocab_size: v.
        device: Of tokens and logits.
    """

    greedy: bool
    scores: Callable[[Sequence[int], Sequence[Tensor], Tensor], Tensor]
    vocab_size: int
    device: torch.device


@runtime_checkable
class Drafter(Protocol):
    """What `speculative(draft=...)` takes.

    A drafter needs no word on what was accepted: it sees the rows again. One that costs nothing beside a forward has
    an attribute `free = True`; it is then asked for its longest draft, which is cut by its `strength`.
    """

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """A new text: the prompts (b, n), padded on the left where attention_mask (b, n) is 0."""

    def propose(
        self, rows: Sequence[Sequence[int]], branching: tuple[int, ...], scorer: Scorer
    ) -> Draft | Sequence[Sequence[int]] | None:
        """What may follow.

        Args:
            rows: The token ids of each row so far, padding included.
            branching: Children of each node by depth; all ones ask for a chain of so many tokens.
            scorer: How the target chooses.

        Returns:
            A `Draft`; or a chain of token ids for each row; or None.
        """
