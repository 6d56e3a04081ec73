"""`AdaDoRAConfig` for `get_peft_model`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hf_efficiency.adapters.adadora import AdaDoRA
from hf_efficiency.adapters.rank_allocation import IMPORTANCES
from hf_efficiency.integrations.peft.base import (
    AdapterLinear,
    LinearAdapterConfig,
    check_dropout,
    check_positive,
)
from hf_efficiency.integrations.peft.types import EfficiencyPeftType
from hf_efficiency.integrations.peft.watch import WatchedTuner

if TYPE_CHECKING:
    from hf_efficiency.adapters.base import BaseLinear


@dataclass
class AdaDoRAConfig(LinearAdapterConfig):
    """AdaLoRA's budget (Zhang et al. 2023) with DoRA's magnitude (Liu et al. 2024).

    A layer of rank r has r (d_in + d_out + 1) + d_out trained numbers.

    Train with `AdaLoRACallback`, which takes the number of steps from the Trainer, allocates the ranks, and removes at
    the end what was pruned. The fields are named as in PEFT's `AdaLoraConfig`.

    Args:
        init_r, target_r: Rank of each layer at the beginning, and mean rank at the end.
        tinit, tfinal: Steps before the ranks are reduced, and after.
        deltaT: Steps between two allocations.
        beta1, beta2: Of the smoothed sensitivity and of its uncertainty.
        orth_reg_weight: Weight of the orthogonality of the singular vectors.
        importance: `"sensitivity"`, `"gradient_norm"` or `"magnitude"`, see `RankAllocator`.
        lora_alpha: The change is multiplied with lora_alpha / init_r.
        adadora_dropout: Probability of dropping an input of the change.
        rank_pattern: The rank of each layer after pruning; filled in by training.

    Raises:
        ValueError: A value is out of its range, or the target above the beginning.
    """

    kind: ClassVar[EfficiencyPeftType] = EfficiencyPeftType.ADADORA
    rank_field: ClassVar[str] = "init_r"

    init_r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    importance: str = "sensitivity"
    lora_alpha: float = 16
    adadora_dropout: float = 0.0
    rank_pattern: dict[str, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, init_r=self.init_r, target_r=self.target_r, deltaT=self.deltaT, lora_alpha=self.lora_alpha)
        check_dropout(self, adadora_dropout=self.adadora_dropout, beta1=self.beta1, beta2=self.beta2)
        if self.target_r > self.init_r:
            raise ValueError(f"AdaDoRAConfig: target_r={self.target_r} must be at most init_r={self.init_r}.")
        if self.importance not in IMPORTANCES:
            raise ValueError(f"AdaDoRAConfig: importance={self.importance!r} must be one of {', '.join(IMPORTANCES)}.")
        for name in ("tinit", "tfinal", "orth_reg_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"AdaDoRAConfig: {name}={getattr(self, name)} must not be below 0.")


class AdaDoRALinear(AdapterLinear):
    """A linear layer with AdaDoRA on it."""

    adapter_layer_names = ("adadora_adapter",)


class AdaDoRAModel(WatchedTuner):
    """Puts AdaDoRA into a model."""

    prefix = "adadora_"
    tuner_layer_cls = AdaDoRALinear
    config_class = AdaDoRAConfig
    watched = "e"
    untouched = (
        "this AdaDoRA model is trained and nobody allocates its budget: no rank is reduced. Add "
        "hf_efficiency.AdaLoRACallback() to the Trainer's callbacks."
    )

    def make_adapter(self, config: AdaDoRAConfig, base: BaseLinear, name: str, shared: None) -> AdaDoRA:
        """The adapter of one layer."""
        r = (config.rank_pattern or {}).get(name, config.init_r)
        return AdaDoRA(base, r, config.lora_alpha / config.init_r, config.adadora_dropout)
