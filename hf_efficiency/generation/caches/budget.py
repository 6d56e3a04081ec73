"""How many tokens a cache may keep: a number of tokens or a fraction of the prompt, and how layers share it."""

import math
from collections.abc import Sequence

Budget = int | float

UNBOUNDED = 2**31

# PyramidKV's beta: the last layer gets 1 / beta of the mean budget (Cai et al. 2024, section 3.2).
_PYRAMID_BETA = 20


def check_budget(name: str, budget: Budget) -> Budget:
    """The budget itself.

    Raises:
        TypeError: It is no number.
        ValueError: A number of tokens below 1, or a fraction outside 0 to 1.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise TypeError(f"{name} is {budget!r}: give tokens as an int, or a fraction of the prompt as a float.")
    if isinstance(budget, int) and budget < 1:
        raise ValueError(f"{name} is {budget} tokens: at least 1 is needed.")
    if isinstance(budget, float) and not 0 < budget <= 1:
        raise ValueError(
            f"{name} is {budget}: a fraction of the prompt lies above 0 and at most at 1; for tokens give an int."
        )
    return budget


def check_tokens(name: str, tokens: int, least: int) -> None:
    """ValueError unless it is a number of tokens, `least` (0 or 1) or more."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < least:
        wanted = "at least 1" if least else "0 or more"
        raise ValueError(f"{name} is {tokens!r}: give a number of tokens, {wanted}.")


def tokens_of(budget: Budget, lengths: Sequence[int]) -> list[int]:
    """Tokens that a budget allows rows of these lengths: a fraction of each row's own, rounded up, at least 1.

    The whole, 1.0, has no bound: nothing leaves later either.
    """
    if isinstance(budget, int):
        return [budget] * len(lengths)
    if budget == 1:
        return [UNBOUNDED] * len(lengths)
    # What 0.3 * 10 is above 3 is a rounding error, no token.
    return [max(1, math.ceil(budget * length - 1e-6)) for length in lengths]


def layer_budgets(budget: Budget, layers: int, schedule: str | Sequence[Budget] = "uniform") -> list[Budget]:
    """One budget a layer.

    Args:
        budget: Of a layer on average.
        layers: How many layers share it.
        schedule: `"uniform"`; `"pyramid"`, falling linearly from the first layer to the last with the same total
            (PyramidKV, Cai et al. 2024, section 3.2); or one budget for each layer.

    Raises:
        TypeError: A budget that is no number.
        ValueError: A budget out of range, an unknown schedule, or a list of another length.
    """
    check_budget("budget", budget)
    if not isinstance(schedule, str):
        given = [check_budget(f"schedule[{i}]", each) for i, each in enumerate(schedule)]
        if len(given) != layers:
            raise ValueError(f"schedule has {len(given)} budgets, and {layers} layers need one each.")
        return given
    if schedule == "uniform":
        return [budget] * layers
    if schedule != "pyramid":
        raise ValueError(f"schedule is {schedule!r}: choose 'uniform', 'pyramid', or give one budget a layer.")
    low = budget / _PYRAMID_BETA
    if isinstance(budget, int):
        low = max(low, 1.0)
    elif 2 * budget - low > 1:
        low = 2 * budget - 1
    exact = [2 * budget - low - i * (2 * budget - 2 * low) / max(layers - 1, 1) for i in range(layers)]
    if layers == 1:
        exact = [float(budget)]
    if isinstance(budget, float):
        return [min(1.0, share) for share in exact]
    ends = [round(sum(exact[: i + 1])) for i in range(layers)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
