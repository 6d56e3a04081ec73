"""The PEFT side of the adapters that sit on attention and feed-forward: where they sit, and how wide they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hf_efficiency.adapters.bottleneck import ACTIVATIONS
from hf_efficiency.adapters.sublayers import find_attention, find_feedforward
from hf_efficiency.integrations.peft.base import (
    LinearAdapterConfig,
    LinearAdapterTuner,
    check_dropout,
    check_positive,
    in_chosen_blocks,
)

if TYPE_CHECKING:
    from torch import nn

    from hf_efficiency.adapters.base import BaseLinear


@dataclass
class SublayerConfig(LinearAdapterConfig):
    """What the configs of adapters on sub-layers share.

    Args:
        target_modules: By default the output projections of the sub-layers that `variant` names, found by structure.
            Any other linear layers, or `"all-linear"`, get an adapter after them.
        variant: `"houlsby"` (after attention and feed-forward) or `"pfeiffer"` (after feed-forward); a type may know
            more.
        reduction_factor: Width of what the adapter reads over the width of its bottleneck, rounded down.
        bottleneck_size: The width of the bottleneck itself, in place of `reduction_factor`.
        non_linearity: `"relu"`, `"gelu"`, `"silu"` or `"tanh"`.
        adapter_dropout: Probability of dropping a number of the bottleneck.

    Raises:
        ValueError: A value is outside its bounds.
    """

    # Each variant: whether it adapts the attention. All adapt the feed-forward.
    variants: ClassVar[dict[str, bool]] = {"houlsby": True, "pfeiffer": False}

    target_modules: list[str] | set[str] | str | None = None
    variant: str = "houlsby"
    reduction_factor: float = 16.0
    bottleneck_size: int | None = None
    non_linearity: str = "relu"
    adapter_dropout: float = 0.0

    def __post_init__(self) -> None:
        by_structure = self.target_modules is None
        super().__post_init__()
        if by_structure:
            self.target_modules = None
        check_choice(self, "variant", self.variants)
        check_choice(self, "non_linearity", ACTIVATIONS)
        check_positive(self, reduction_factor=self.reduction_factor)
        if self.bottleneck_size is not None:
            check_positive(self, bottleneck_size=self.bottleneck_size)
        check_dropout(self, adapter_dropout=self.adapter_dropout)

    def bottleneck(self, width: int) -> int:
        """Width of the bottleneck of an adapter on hidden states of the given width."""
        return int(width // self.reduction_factor) if self.bottleneck_size is None else self.bottleneck_size

    def check_layer(self, name: str, base: BaseLinear) -> None:
        """Refuses a bottleneck of no width, or wider than what it reads."""
        width = base.out_features
        if not 1 <= self.bottleneck(width) <= width:
            given = "reduction_factor" if self.bottleneck_size is None else "bottleneck_size"
            raise ValueError(
                f"{given}={getattr(self, given)} gives {name}, of width {width}, a bottleneck of width "
                f"{self.bottleneck(width)}: choose it so that this lies between 1 and {width}."
            )


def check_choice(config: object, name: str, choices: Any) -> None:
    """Raises a ValueError if a field of the config is none of the choices."""
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{type(config).__name__}: {name}={value!r} must be one of {', '.join(sorted(choices))}.")


class SublayerTuner(LinearAdapterTuner):
    """Finds the output projections where the config names no layers."""

    def _targets(self, model: nn.Module, config: Any) -> dict[str, BaseLinear]:
        if config.target_modules is None:
            found = find_feedforward(model)
            if config.variants[config.variant]:
                found += find_attention(model)
            config.target_modules = in_chosen_blocks(model, [sublayer.output for sublayer in found], config)
        return super()._targets(model, config)
