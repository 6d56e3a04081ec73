"""`DVoRAConfig` for `get_peft_model`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hf_efficiency.adapters.dvora import DVoRA, projections
from hf_efficiency.integrations.peft.base import (
    AdapterLinear,
    LinearAdapterConfig,
    LinearAdapterTuner,
    check_dropout,
    check_positive,
)
from hf_efficiency.integrations.peft.types import EfficiencyPeftType

if TYPE_CHECKING:
    from hf_efficiency.adapters.base import BaseLinear, FrozenMatrix


@dataclass
class DVoRAConfig(LinearAdapterConfig):
    """VeRA in DoRA's direction (Liu et al. 2024, section 5.5): r + 2 d_out trained numbers a layer.

    Args:
        r: Rank of the frozen random matrices; it costs one trained number each, so it may be large.
        projection_prng_key: Seed of the random matrices, which are not saved.
        d_initial: Where the vector d starts.
        dvora_dropout: Probability of dropping an input of the change.

    Raises:
        ValueError: r or d_initial is not above 0, or the dropout is outside [0, 1).
    """

    kind: ClassVar[EfficiencyPeftType] = EfficiencyPeftType.DVORA

    r: int = 256
    projection_prng_key: int = 0
    d_initial: float = 0.1
    dvora_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, r=self.r, d_initial=self.d_initial)
        check_dropout(self, dvora_dropout=self.dvora_dropout)


class DVoRALinear(AdapterLinear):
    """A linear layer with DVoRA on it."""

    adapter_layer_names = ("dvora_adapter",)


class DVoRAModel(LinearAdapterTuner):
    """Puts DVoRA into a model."""

    prefix = "dvora_"
    tuner_layer_cls = DVoRALinear
    config_class = DVoRAConfig

    def make_shared(self, config: DVoRAConfig, layers: dict[str, BaseLinear]) -> tuple[FrozenMatrix, FrozenMatrix]:
        """The random matrices, wide enough for every layer."""
        d_in = max(layer.in_features for layer in layers.values())
        d_out = max(layer.out_features for layer in layers.values())
        return projections(config.r, d_in, d_out, config.projection_prng_key)

    def make_adapter(
        self, config: DVoRAConfig, base: BaseLinear, name: str, shared: tuple[FrozenMatrix, FrozenMatrix]
    ) -> DVoRA:
        """The adapter of one layer."""
        return DVoRA(base, shared, config.r, config.d_initial, config.dvora_dropout)
