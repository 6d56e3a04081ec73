"""The caches that evict by score: H2O, SnapKV, TOVA, pinned spans, and random tokens to compare with."""

from collections.abc import Sequence
from typing import Any

from hf_efficiency.generation.caches.budget import Budget, check_budget, layer_budgets
from hf_efficiency.generation.caches.h2o import HeavyHitters
from hf_efficiency.generation.caches.policies import Policy
from hf_efficiency.generation.caches.simple import Newest, Pinned, RandomTokens
from hf_efficiency.generation.caches.snapkv import ObservationWindow
from hf_efficiency.generation.caches.tova import LastAttention
from hf_efficiency.integrations.transformers.caches.base import EfficientCache
from hf_efficiency.integrations.transformers.caches.evicting import EvictingLayer
from transformers import PreTrainedModel

Schedule = str | Sequence[Budget]

_INNER = {"h2o": HeavyHitters, "tova": LastAttention, "snapkv": ObservationWindow, "newest": Newest}


class _EvictingCache(EfficientCache):
    def __init__(self, model: PreTrainedModel, policy: Policy, budget: Budget, schedule: Schedule, least: int) -> None:
        """
        Args:
            model: The model.
            policy: Chooses.
            budget: See `layer_budgets`.
            schedule: See `layer_budgets`.
            least: Tokens that any layer must hold.
        """
        check_budget("budget", budget)

        def make(i: int, n: int) -> EvictingLayer:
            share = layer_budgets(budget, n, schedule)[i]
            if isinstance(share, int) and share < least:
                raise ValueError(
                    f"{type(self).__name__} gives layer {i} a budget of {share} tokens, and the tokens that must stay "
                    f"(pinned, recent, and one to choose) are {least}: raise the budget."
                )
            return EvictingLayer(policy, share)

        super().__init__(model, make, attends=True)


def _recent(name: str, recent: Budget) -> int:
    """Tokens that `recent` alone asks for.

    Raises:
        TypeError: It is no number.
        ValueError: It is out of range.
    """
    if recent == 0:
        return 0
    check_budget(name, recent)
    return recent if isinstance(recent, int) else 0


class H2OCache(_EvictingCache):
    """Keeps the heavy hitters: the tokens that got most attention so far, and recent ones (Zhang et al. 2023).

    Each key-value head keeps tokens of its own. The attention is summed by the function that computes it. Memory of a
    layer while decoding: rows * heads * (budget + 1) * ((key size + value size) * bytes of the dtype + 8) + 8 * rows.

    Args:
        model: The model that will use the cache; it must attend with "sdpa" or "eager".
        budget: Tokens to keep in each layer, or a fraction of each row's prompt.
        recent: How many of them are the newest tokens, or which fraction of the budget.
        schedule: "uniform", "pyramid" (Cai et al. 2024), or one budget a layer.

    Raises:
        TypeError: A budget that is no number.
        ValueError: A budget out of range or below `recent` + 1.
    """

    name = "h2o"

    def __init__(
        self, model: PreTrainedModel, budget: Budget = 0.5, recent: Budget = 0.5, schedule: Schedule = "uniform"
    ) -> None:
        self.options: dict[str, Any] = {"budget": budget, "recent": recent, "schedule": schedule}
        least = _recent("recent", recent) + 1
        super().__init__(model, HeavyHitters(recent), budget, schedule, least)


class TOVACache(_EvictingCache):
    """Drops the token that the newest query attends to least, the same in all heads (Oren et al. 2024).

    Args:
        model: See `H2OCache`.
        budget: See `H2OCache`.
        schedule: See `H2OCache`.
    """

    name = "tova"

    def __init__(self, model: PreTrainedModel, budget: Budget = 0.5, schedule: Schedule = "uniform") -> None:
        self.options = {"budget": budget, "schedule": schedule}
        super().__init__(model, LastAttention(), budget, schedule, 1)


class SnapKVCache(_EvictingCache):
    """Compresses each prompt to what its last tokens attend to (Li et al. 2024); tokens generated later all stay.

    Args:
        model: See `H2OCache`.
        budget: Tokens of the prompt to keep, its last ones included, or a fraction of it.
        window: The last tokens of the prompt, which vote and stay.
        kernel_size: Neighbours over which the votes are averaged.
        schedule: See `H2OCache`.
    """

    name = "snapkv"

    def __init__(
        self,
        model: PreTrainedModel,
        budget: Budget = 0.5,
        window: int = 32,
        kernel_size: int = 5,
        schedule: Schedule = "uniform",
    ) -> None:
        self.options = {"budget": budget, "window": window, "kernel_size": kernel_size, "schedule": schedule}
        policy = ObservationWindow(recent=window, kernel_size=kernel_size)
        super().__init__(model, policy, budget, schedule, window + 1)


class RandomCache(_EvictingCache):
    """Keeps random tokens, and recent ones where asked: what every other cache must beat.

    Args:
        model: See `H2OCache`.
        budget: See `H2OCache`.
        recent: See `H2OCache`.
        seed: Of the draw.
        schedule: See `H2OCache`.
    """

    name = "random"

    def __init__(
        self,
        model: PreTrainedModel,
        budget: Budget = 0.5,
        recent: Budget = 0,
        seed: int = 0,
        schedule: Schedule = "uniform",
    ) -> None:
        self.options = {"budget": budget, "recent": recent, "seed": seed, "schedule": schedule}
        policy = RandomTokens(recent=recent, seed=seed)
        super().__init__(model, policy, budget, schedule, _recent("recent", recent) + 1)


class PriorityCache(_EvictingCache):
    """Spans that are pinned, such as the system prompt, never leave; another policy chooses among the rest.

    Args:
        model: See `H2OCache`.
        pinned: (start, end) in tokens of each row's own text: padding is not counted.
        budget: As for `H2OCache`, the pinned tokens included.
        policy: "h2o", "tova", "snapkv" or "newest".
        schedule: See `H2OCache`.

    Raises:
        ValueError: Spans that are empty, an unknown policy, or a budget that the pinned tokens don't leave anything of.
    """

    name = "priority"

    def __init__(
        self,
        model: PreTrainedModel,
        pinned: Sequence[tuple[int, int]],
        budget: Budget = 0.5,
        policy: str = "h2o",
        schedule: Schedule = "uniform",
    ) -> None:
        if policy not in _INNER:
            raise ValueError(f"policy is {policy!r}: choose one of {', '.join(_INNER)}.")
        spans = [(int(start), int(end)) for start, end in pinned]
        self.options = {"pinned": spans, "budget": budget, "policy": policy, "schedule": schedule}
        chosen = Pinned(spans=spans, inner=_INNER[policy]())
        super().__init__(model, chosen, budget, schedule, chosen.pinned + 1)
