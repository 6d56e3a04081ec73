"""`DyLoRAConfig` for `get_peft_model`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hf_efficiency.adapters.dylora import DyLoRA, NestedRank
from hf_efficiency.integrations.peft.base import (
    AdapterLinear,
    LinearAdapterConfig,
    LinearAdapterTuner,
    check_dropout,
    check_positive,
)
from hf_efficiency.integrations.peft.types import EfficiencyPeftType

if TYPE_CHECKING:
    from hf_efficiency.adapters.base import BaseLinear


@dataclass
class DyLoRAConfig(LinearAdapterConfig):
    """Low-rank adapters that work at every rank up to r (Valipour et al. 2023): r (d_in + d_out) numbers a layer.

    After training, `model.set_rank(k)` chooses the rank that is used, and `model.truncate_rank(k)` also drops the rest,
    so that less is saved.

    Args:
        r: Largest rank.
        min_rank: Smallest rank that is trained.
        lora_alpha: The change at rank k is multiplied with lora_alpha / k.
        frozen: Whether a step trains the row and column of its rank only (faster, slightly worse), or all up to it.
        dylora_dropout: Probability of dropping an input of the change.
        used_rank: The rank outside training; r by default.

    Raises:
        ValueError: r or lora_alpha is not above 0, min_rank or used_rank is not in 1..r, or the dropout is outside
            [0, 1).
    """

    kind: ClassVar[EfficiencyPeftType] = EfficiencyPeftType.DYLORA
    rank_field: ClassVar[str] = "r"

    r: int = 16
    min_rank: int = 1
    lora_alpha: float = 16
    frozen: bool = False
    dylora_dropout: float = 0.0
    used_rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, r=self.r, lora_alpha=self.lora_alpha)
        check_dropout(self, dylora_dropout=self.dylora_dropout)
        for name, value in {"min_rank": self.min_rank, "used_rank": self.used_rank}.items():
            if value is not None and not 1 <= value <= self.r:
                raise ValueError(f"DyLoRAConfig: {name}={value} must be between 1 and r={self.r}.")


class DyLoRALinear(AdapterLinear):
    """A linear layer with DyLoRA on it."""

    adapter_layer_names = ("dylora_adapter",)


class DyLoRAModel(LinearAdapterTuner):
    """Puts DyLoRA into a model."""

    prefix = "dylora_"
    tuner_layer_cls = DyLoRALinear
    config_class = DyLoRAConfig

    def make_shared(self, config: DyLoRAConfig, layers: dict[str, BaseLinear]) -> tuple[NestedRank, str]:
        """The rank in use, and the name of the layer that draws it."""
        return NestedRank(config.min_rank, config.r, config.used_rank or config.r), next(iter(layers))

    def make_adapter(self, config: DyLoRAConfig, base: BaseLinear, name: str, shared: tuple[NestedRank, str]) -> DyLoRA:
        """The adapter of one layer."""
        rank, first = shared
        return DyLoRA(
            base,
            rank,
            leads=name == first,
            alpha=config.lora_alpha,
            frozen=config.frozen,
            dropout=config.dylora_dropout,
        )

    def set_rank(self, r: int, adapter_name: str | None = None) -> None:
        """Uses an adapter (the active one by default) at rank r outside training.

        Raises:
            ValueError: r is not one of its ranks, or it is merged.
        """
        name = self._adapter(r, adapter_name)
        for adapter in self._layers(name):
            adapter.rank.used = r
        self._config(name).used_rank = r

    def truncate_rank(self, r: int, adapter_name: str | None = None) -> None:
        """Drops everything above rank r from an adapter: what is saved and trained from here on is smaller.

        Raises:
            ValueError: r is not one of its ranks, or it is merged.
        """
        name = self._adapter(r, adapter_name)
        config = self._config(name)
        for adapter in self._layers(name):
            adapter.truncate(r)
            adapter.rank.largest = adapter.rank.used = adapter.rank.drawn = r
            adapter.rank.smallest = min(adapter.rank.smallest, r)
        config.r = config.used_rank = r
        config.min_rank = min(config.min_rank, r)

    def _adapter(self, r: int, adapter_name: str | None) -> str:
        """The name of the adapter to change, if it can be changed."""
        name: str = adapter_name or self.active_adapters[0]
        if name not in self.peft_config:
            raise ValueError(f"there is no adapter {name!r}; there are {', '.join(self.peft_config)}.")
        largest = self._config(name).r
        if not 1 <= r <= largest:
            raise ValueError(f"rank {r} must be between 1 and {largest}, the rank of {name!r}.")
        if any(isinstance(m, DyLoRALinear) and name in m.merged_adapters for m in self.model.modules()):
            raise ValueError(f"adapter {name!r} is merged at another rank: call unmerge_adapter() first.")
        return name

    def _config(self, name: str) -> Any:
        return self.peft_config[name]

    def _layers(self, name: str) -> list[DyLoRA]:
        return [m.adapters[name] for m in self.model.modules() if isinstance(m, DyLoRALinear) and name in m.adapters]
