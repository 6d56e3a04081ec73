"""How a budget of tokens is shared between parts and sentences.

Jiang et al. 2023, "LLMLingua", section 4.1 (the instruction keeps 0.9, the question all, the rest shares what is left),
and Jiang et al. 2024, "LongLLMLingua", equation 5 (a document's share falls linearly with its rank).
"""

from __future__ import annotations

from collections.abc import Sequence

INSTRUCTION_RATIO = 0.9
QUESTION_RATIO = 1.0


def part_ratios(
    counts: Sequence[int],
    roles: Sequence[str],
    budget: int,
    ratios: Sequence[float | None] | None = None,
) -> list[float]:
    """The share of each part's tokens that stays, so that together they fill the budget.

    The question comes first, then the instruction, and the context shares what is left; where the instruction's 0.9
    leaves the context nothing, both keep the same share of what the question leaves.

    Args:
        counts: Tokens of each part.
        roles: "instruction", "context" or "question".
        budget: Tokens to keep.
        ratios: Shares that are fixed; None where the controller chooses.

    Raises:
        ValueError: The question, or what is fixed, needs more than the budget.
    """
    given = list(ratios) if ratios is not None else [None] * len(counts)
    question = sum(n for n, role, r in zip(counts, roles, given, strict=True) if role == "question" and r is None)
    if question > budget:
        raise ValueError(
            f"the question has {question} tokens and is kept whole, but the ratio leaves a budget of {budget} tokens: "
            "raise the ratio or shorten the question"
        )
    fixed = sum(n * r for n, r in zip(counts, given, strict=True) if r is not None)
    left = budget - question - fixed
    if left < -0.5:
        raise ValueError(
            f"the segments with a ratio of their own and the question need {question + fixed:.0f} tokens, but the "
            f"ratio leaves a budget of {budget}: lower those ratios or raise the ratio"
        )
    free = {"instruction": 0, "context": 0}
    for n, role, r in zip(counts, roles, given, strict=True):
        if r is None and role != "question":
            free[role] += n
    instruction = INSTRUCTION_RATIO
    shared = max(0.0, left) / max(1, sum(free.values()))
    if INSTRUCTION_RATIO * free["instruction"] > left or (not free["context"] and free["instruction"]):
        instruction = min(1.0, shared)
    context = min(1.0, max(0.0, left - instruction * free["instruction"]) / max(1, free["context"]))
    chosen = {"question": QUESTION_RATIO, "instruction": instruction, "context": context}
    return [chosen[role] if r is None else r for role, r in zip(roles, given, strict=True)]


def ranked_ratios(ranks: Sequence[int], ratio: float, spread: float = 0.3) -> list[float]:
    """Shares by rank, 0 the most relevant: max(min((1 - 2 I / N) spread + ratio, 1), 0) (LongLLMLingua, equation 5)."""
    n = max(1, len(ranks))
    return [max(min((1 - 2 * rank / n) * spread + ratio, 1.0), 0.0) for rank in ranks]


def filled(order: Sequence[int], counts: Sequence[int], budget: float) -> list[int]:
    """The first items of `order` whose tokens stay within the budget, and always the first."""
    chosen: list[int] = []
    total = 0
    for item in order:
        if chosen and total + counts[item] > budget:
            continue
        chosen.append(item)
        total += counts[item]
    return chosen
