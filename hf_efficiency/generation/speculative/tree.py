"""Trees of drafted tokens that have as many children at each node of a depth."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

# Nodes of a draft: verified in one forward with the token before them, which caches take as one step of at most 64.
MOST_NODES = 63


def check_shape(k: int, branching: Sequence[int] | None) -> tuple[int, ...]:
    """The children of each node by depth: `branching`, or a chain of k.

    Raises:
        ValueError: Numbers out of range, or more than 63 nodes.
    """
    if branching is None:
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MOST_NODES:
            raise ValueError(f"k is {k!r}: draft 1 to {MOST_NODES} tokens at a time.")
        return (1,) * k
    shape = tuple(branching)
    if not shape or any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in shape):
        raise ValueError(
            f"branching is {branching!r}: give how many children each node has at each depth, such as (3, 2, 1)."
        )
    nodes = len(TreeShape(shape).parents) if max(shape) <= MOST_NODES and len(shape) <= MOST_NODES else MOST_NODES + 1
    if nodes > MOST_NODES:
        raise ValueError(f"branching {shape} makes a tree of more than {MOST_NODES} nodes: branch less, or less deep.")
    return shape


class TreeShape:
    """A tree by its branching, nodes numbered depth by depth.

    Attributes:
        branching: Children of each node, by depth.
    """

    def __init__(self, branching: tuple[int, ...]) -> None:
        self.branching = branching

    @cached_property
    def levels(self) -> list[range]:
        """The nodes of each depth."""
        sizes, total = [0], 1
        for width in self.branching:
            total *= width
            sizes.append(sizes[-1] + total)
            if total > 2 * MOST_NODES:
                break
        return [range(a, b) for a, b in pairwise(sizes)]

    @cached_property
    def parents(self) -> list[int]:
        """Of each node; -1 for those of the first depth."""
        found: list[int] = []
        above = [-1]
        for level, width in zip(self.levels, self.branching, strict=False):
            found += [parent for parent in above for _ in range(width)]
            above = list(level)
        return found
