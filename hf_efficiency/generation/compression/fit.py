"""Choose the words that fill a budget, counted by the tokenizer that will read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_FILL = 48  # words that are tried one by one once the best ones are in


def fit(priorities: Sequence[float], budget: int, count: Callable[[list[int]], int]) -> list[int]:
    """The units of highest priority whose joined text has at most `budget` tokens, in their own order.

    Units go in by priority until the next one would pass the budget; the room that a long unit leaves is filled with
    the next ones that fit. Words that are joined anew may merge into other tokens, so the joined text is counted.

    Args:
        priorities: Of each unit.
        budget: Tokens.
        count: Tokens of the text that given units (ascending) make.
    """
    order = sorted(range(len(priorities)), key=lambda i: (-priorities[i], i))
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        if count(sorted(order[:middle])) <= budget:
            low = middle
        else:
            high = middle - 1
    chosen = sorted(order[:low])
    used = count(chosen)
    for unit in order[low : low + _FILL]:
        if used >= budget:
            break
        wider = sorted([*chosen, unit])
        length = count(wider)
        if length <= budget:
            chosen, used = wider, length
    return chosen


def quantiles(scores: Sequence[float], groups: Sequence[int]) -> list[float]:
    """The place of each score among those of its group, from 0 for the highest to below 1."""
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    result = [0.0] * len(scores)
    for indices in members.values():
        for place, i in enumerate(sorted(indices, key=lambda i: (-scores[i], i))):
            result[i] = place / len(indices)
    return result
