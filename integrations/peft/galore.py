"""`GaLoreConfig` for `get_peft_model`: the weights of the targets themselves are trained, with low-rank states.

There is no adapter beside the weight. The tuner chooses what is trained, PEFT saves and loads it, and
`hf_efficiency.galore(model)` makes the optimizer that the config describes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_efficiency.adapters.base import BaseLinear, LinearAdapter
from hf_efficiency.integrations.peft.base import (
    AdapterLinear,
    LinearAdapterConfig,
    LinearAdapterTuner,
    without_adapters,
)
from hf_efficiency.integrations.peft.types import EfficiencyPeftType
from hf_efficiency.optim import GaLoreOptions, variant_options

if TYPE_CHECKING:
    from peft import PeftConfig

# Fields that are options of the optimizer under the same name.
_OPTION_FIELDS = (
    "update_proj_gap",
    "scale",
    "side",
    "projection",
    "state_bits",
    "projection_bits",
    "lazy_threshold",
    "lazy_patience",
    "seed",
)


@dataclass
class GaLoreConfig(LinearAdapterConfig):
    """Training of whole weights with the optimizer states in a subspace of rank r (Zhao et al. 2024).

    Fields that are None have the value of the variant. All trained weights are saved, as large as the layers.

    Args:
        r: Rank of the optimizer states.
        variant: A row of `hf_efficiency.optim.VARIANTS`: `"galore"`, `"galore-8bit"`, `"q-galore"`, `"apollo"`, ...
        keep_base: Train a copy of each weight and keep the original, so that adapters can be several, disabled and
            unmerged. Off: the model's own weights change in place and no memory is added.
        update_proj_gap, scale, side, projection, state_bits, projection_bits, lazy_threshold, lazy_patience, seed: As
            in `hf_efficiency.optim.GaLoreOptions`.

    Raises:
        ValueError: An option out of range.
    """

    kind: ClassVar[EfficiencyPeftType] = EfficiencyPeftType.GALORE
    rank_field: ClassVar[str] = "r"

    r: int = 128
    variant: str = "galore"
    keep_base: bool = False
    update_proj_gap: int | None = None
    scale: float | None = None
    side: str | None = None
    projection: str | None = None
    state_bits: int | None = None
    projection_bits: int | None = None
    lazy_threshold: float | None = None
    lazy_patience: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.optimizer_options()

    def optimizer_options(self) -> GaLoreOptions:
        """What the optimizer is told."""
        given = {name: getattr(self, name) for name in _OPTION_FIELDS if getattr(self, name) is not None}
        return variant_options(self.variant, **{"rank": self.r, **given})


class DenseWeight(LinearAdapter):
    """A trained weight in the layout of its layer; the layer's own parameter unless the base is kept."""

    def __init__(self, layer: nn.Module, keep_base: bool) -> None:
        super().__init__()
        own: Any = layer.weight
        self.keep_base = keep_base
        self.transposed = isinstance(layer, Conv1D)
        self.weight: nn.Parameter = nn.Parameter(own.detach().clone()) if keep_base else own
        self._original: Tensor | None = None

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The trained weight, (d_out, d_in)."""
        trained = self.weight.detach()
        self._original = weight
        return (trained.T if self.transposed else trained).to(weight.dtype, copy=self.keep_base)

    def unmerged_weight(self, weight: Tensor) -> Tensor:
        """What the layer had before, to the bit; the trained weight where the base was not kept."""
        original, self._original = self._original, None
        return weight if original is None or not self.keep_base else original


class GaLoreLinear(AdapterLinear):
    """A linear layer whose weight is trained. One adapter is active at a time."""

    adapter_layer_names = ("galore_adapter",)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        # the adapter comes first: a weight that both hold then counts as the adapter's, and PEFT does not freeze it
        del self.base_layer
        self.base_layer = base_layer

    def add(self, adapter_name: str, adapter: LinearAdapter, inference_mode: bool) -> None:
        """Puts a trained weight on the layer. It is where the layer is, and has its dtype."""
        self.adapters[adapter_name] = adapter
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """ValueError where there is nothing to go back to."""
        if not enabled and not self.keeps_base:
            raise ValueError(
                "The base weights were trained in place, so there is none to show without the adapter: use "
                "GaLoreConfig(keep_base=True)."
            )
        super().enable_adapters(enabled)

    @property
    def keeps_base(self) -> bool:
        """Whether the layer's own weight stays as it was."""
        return all(adapter.keep_base for adapter in self.adapters.values())

    def trained_weights(self) -> list[nn.Parameter]:
        """The weights of the active adapters."""
        self._share()
        return [adapter.weight for adapter in self._active() if isinstance(adapter, DenseWeight)]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output (..., d_out) with the active adapter's weight."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        weights = [] if self.disable_adapters or self.merged else self.trained_weights()
        if len(weights) > 1:
            raise ValueError(
                f"Adapters {', '.join(self.active_adapters)} are active at once, and each is a whole weight: activate "
                "one with set_adapter."
            )
        if not weights or weights[0] is self.base_layer.weight:
            return self.base_layer(x, *args, **kwargs)
        return torch.func.functional_call(self.base_layer, {"weight": weights[0]}, (x, *args), kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the trained weight into the layer.

        Raises:
            ValueError: For more than one adapter, or (`safe_merge`) a weight that is not finite.
        """
        names = [name for name in adapter_names or self.active_adapters if name in self.adapters]
        if len({*names, *self.merged_adapters}) > 1:
            raise ValueError(
                f"Adapters {', '.join(sorted({*names, *self.merged_adapters}))} are whole weights, which can't be "
                "merged into one: merge a single one."
            )
        self._share()
        super().merge(safe_merge, adapter_names)

    def _share(self) -> None:
        """Makes the layer hold the adapter's parameter again, which loading may have put another one in place of."""
        for adapter in self.adapters.values():
            if not adapter.keep_base and not self.merged and self.base_layer.weight is not adapter.weight:
                self.base_layer.weight = adapter.weight


class GaLoreModel(LinearAdapterTuner):
    """Makes the weights of the targets trainable."""

    prefix = "galore_"
    tuner_layer_cls = GaLoreLinear
    config_class = GaLoreConfig

    @property
    def galore_settings(self) -> dict[str, Any]:
        """What `hf_efficiency.galore` reads: the variant and the options of the active adapter."""
        config: Any = self.peft_config[self.active_adapters[0]]
        options = {name: getattr(config, name) for name in _OPTION_FIELDS if getattr(config, name) is not None}
        return {"variant": config.variant, "options": {"rank": config.r, **options}}

    def galore_weights(self) -> list[nn.Parameter]:
        """The weights that are trained and projected."""
        layers = [layer for layer in self.model.modules() if isinstance(layer, GaLoreLinear)]
        return [weight for layer in layers for weight in layer.trained_weights()]

    def check_targets(self, model: nn.Module, config: GaLoreConfig, layers: dict[str, BaseLinear]) -> None:
        """Refuses what can't be trained."""
        for name in layers:
            target = model.get_submodule(name)
            layer = without_adapters(target)
            weight = getattr(layer, "weight", None)
            if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
                raise ValueError(
                    f"GaLore trains weights themselves, and {name} is a {type(layer).__name__}, quantized: name dense "
                    "layers in target_modules, load the model without quantization_config, or train adapters "
                    "(LoraConfig)."
                )
            if isinstance(target, GaLoreLinear) and not (config.keep_base and target.keeps_base):
                trained = "is" if not target.keeps_base else "would be"
                raise ValueError(
                    f"The weight of {name}, which has the adapter {next(iter(target.adapters))!r}, {trained} trained "
                    "in place: several adapters need GaLoreConfig(keep_base=True), all of them."
                )

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
        self._shared = DenseWeight(without_adapters(target), peft_config.keep_base)
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key, parameter_name)

    def make_adapter(self, config: PeftConfig, base: BaseLinear, name: str, shared: DenseWeight) -> DenseWeight:
        """The weight that was made for this layer."""
        return shared

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing: these are the weights of the model, in its dtype."""
