"""`IntrinsicConfig` for `get_peft_model`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hf_efficiency.adapters.intrinsic import Intrinsic, Subspace
from hf_efficiency.integrations.peft.base import (
    AdapterLinear,
    LinearAdapterConfig,
    LinearAdapterTuner,
    check_positive,
)
from hf_efficiency.integrations.peft.types import EfficiencyPeftType

if TYPE_CHECKING:
    from hf_efficiency.adapters.base import BaseLinear


@dataclass
class IntrinsicConfig(LinearAdapterConfig):
    """Training in a random subspace of all weights (Li et al. 2018, Aghajanyan et al. 2021): d numbers altogether.

    Args:
        d: Number of trained numbers, for all layers together.
        said: Structure-aware: one of the d numbers for each layer is its factor, so that d minus the number of layers
            are left for the subspace.
        projection_prng_key: Seed of the projection, which is not saved.

    Raises:
        ValueError: d is not above 0.
    """

    kind: ClassVar[EfficiencyPeftType] = EfficiencyPeftType.INTRINSIC

    d: int = 1000
    said: bool = False
    projection_prng_key: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, d=self.d)


class IntrinsicLinear(AdapterLinear):
    """A linear layer that moves in the subspace."""

    adapter_layer_names = ("intrinsic_adapter",)


class IntrinsicModel(LinearAdapterTuner):
    """Lets the layers of a model move in one subspace."""

    prefix = "intrinsic_"
    tuner_layer_cls = IntrinsicLinear
    config_class = IntrinsicConfig

    def make_shared(self, config: IntrinsicConfig, layers: dict[str, BaseLinear]) -> Subspace:
        """The subspace.

        Raises:
            ValueError: Its dimension is above the number of weights, or (structure-aware) leaves nothing to share.
        """
        weights = sum(layer.in_features * layer.out_features for layer in layers.values())
        if config.d > weights:
            raise ValueError(f"d={config.d} is above {weights}, the number of weights that are adapted: choose less.")
        dimension = config.d - len(layers) if config.said else config.d
        if dimension < 1:
            raise ValueError(
                f"d={config.d} leaves nothing to share, for each of the {len(layers)} layers has a factor of its own: "
                f"choose at least {len(layers) + 1}, or said=False."
            )
        return Subspace(dimension, config.projection_prng_key)

    def make_adapter(self, config: IntrinsicConfig, base: BaseLinear, name: str, shared: Subspace) -> Intrinsic:
        """The adapter of one layer."""
        return Intrinsic(base, name, shared, config.said)
