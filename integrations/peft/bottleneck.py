"""`BottleneckConfig` for `get_peft_model`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hf_efficiency.adapters.bottleneck import Bottleneck, ParallelBottleneck, SublayerInput
from hf_efficiency.adapters.sublayers import find_feedforward
from hf_efficiency.integrations.peft.base import AdapterLinear, check_positive
from hf_efficiency.integrations.peft.sublayers import SublayerConfig, SublayerTuner
from hf_efficiency.integrations.peft.types import EfficiencyPeftType

if TYPE_CHECKING:
    from torch import nn

    from hf_efficiency.adapters.base import BaseLinear


@dataclass
class BottleneckConfig(SublayerConfig):
    """Bottleneck adapters: 2 m d + d + m trained numbers each, for a bottleneck of width m. They cannot be merged.

    Args:
        variant: `"houlsby"` (after attention and feed-forward, Houlsby et al. 2019), `"pfeiffer"` (after feed-forward,
            Pfeiffer et al. 2021) or `"parallel"` (beside the feed-forward, He et al. 2022, section 3.3). A parallel
            adapter sits on the output projection too; the sub-layer's input is kept for it by the layer that reads it.
        reduction_factor, bottleneck_size, non_linearity, adapter_dropout, target_modules: As in `SublayerConfig`;
            what `target_modules` names for `"parallel"` must be output projections of feed-forwards.
        scale: Factor of what the adapter adds: 4 for `"parallel"` (He et al. 2022), else 1.
        learn_scale: Whether the factor is trained: for `"parallel"`, unless said otherwise.

    Raises:
        ValueError: A value is outside its bounds.
    """

    kind: ClassVar[EfficiencyPeftType] = EfficiencyPeftType.BOTTLENECK
    variants: ClassVar[dict[str, bool]] = {**SublayerConfig.variants, "parallel": False}

    scale: float | None = None
    learn_scale: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is None:
            self.scale = 4.0 if self.variant == "parallel" else 1.0
        if self.learn_scale is None:
            self.learn_scale = self.variant == "parallel"
        check_positive(self, scale=self.scale)


class BottleneckLinear(AdapterLinear):
    """A linear layer with a bottleneck after it, or with a part of a parallel adapter on it."""

    adapter_layer_names = ("bottleneck_adapter",)


class BottleneckModel(SublayerTuner):
    """Puts bottleneck adapters into a model."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLinear
    config_class = BottleneckConfig

    def _targets(self, model: nn.Module, config: BottleneckConfig) -> dict[str, BaseLinear]:
        layers = super()._targets(model, config)
        if config.variant == "parallel":
            self._readers = {sublayer.output: sublayer.inputs[0] for sublayer in find_feedforward(model)}
            strangers = sorted(set(layers) - set(self._readers))
            if strangers:
                raise ValueError(
                    f"a parallel adapter sits on the output projection of a feed-forward, and {strangers[0]} is none: "
                    "leave target_modules out, or choose another variant."
                )
        return layers

    def make_adapter(self, config: BottleneckConfig, base: BaseLinear, name: str, shared: None) -> Bottleneck:
        """The adapter of one layer."""
        d, scale = base.out_features, config.scale or 1.0
        rest = (config.bottleneck(d), config.non_linearity, config.adapter_dropout, scale, bool(config.learn_scale))
        return ParallelBottleneck(SublayerInput(), d, *rest) if config.variant == "parallel" else Bottleneck(d, *rest)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key)
        if peft_config.variant != "parallel":
            return
        adapter: Any = self.model.get_submodule(current_key)
        reader = self._readers[current_key]
        layer = self.model.get_submodule(reader)
        if not isinstance(layer, BottleneckLinear):
            layer = BottleneckLinear(layer, adapter_name)
            self.model.set_submodule(reader, layer)
        layer.add(adapter_name, adapter.adapters[adapter_name].source, peft_config.inference_mode)
