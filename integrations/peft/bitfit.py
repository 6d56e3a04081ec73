"""`BitFitConfig` for `get_peft_model`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hf_efficiency.adapters.bitfit import BitFit
from hf_efficiency.adapters.sublayers import find_attention, find_feedforward
from hf_efficiency.integrations.peft.base import (
    AdapterLinear,
    LinearAdapterConfig,
    LinearAdapterTuner,
    in_chosen_blocks,
    is_linear,
    linear_of,
    without_adapters,
)
from hf_efficiency.integrations.peft.sublayers import check_choice
from hf_efficiency.integrations.peft.types import EfficiencyPeftType
from peft.tuners.tuners_utils import (
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    check_target_module_exists,
)

if TYPE_CHECKING:
    from hf_efficiency.adapters.base import BaseLinear


@dataclass
class BitFitConfig(LinearAdapterConfig):
    """Only biases are trained (Ben Zaken et al. 2022): d_out numbers a layer.

    Args:
        biases: Which, where `target_modules` does not say it: `"all"` (of linear layers and norms, the paper's BitFit),
            `"linear"` (of linear layers) or `"query_mlp"` (of the layers that compute queries, with keys and values
            where these are fused, and of those that feed-forwards begin with: the paper's b_q and b_m2). The output
            head's is left out.
        target_modules: Names or a regular expression of layers instead; `"all-linear"` means `biases="linear"`.
        add_bias: Gives a bias, zero at first, to linear layers that have none. It cannot be merged.

    Raises:
        ValueError: `biases` is none of the above.
    """

    kind: ClassVar[EfficiencyPeftType] = EfficiencyPeftType.BITFIT

    target_modules: list[str] | set[str] | str | None = None
    biases: str = "all"
    add_bias: bool = False

    def __post_init__(self) -> None:
        named = self.target_modules
        super().__post_init__()
        check_choice(self, "biases", ("all", "linear", "query_mlp"))
        if named == "all-linear":
            self.biases = "linear"
        if named in (None, "all-linear"):
            self.target_modules = None


class BitFitLinear(AdapterLinear):
    """A linear layer or a norm whose bias is trained."""

    adapter_layer_names = ("bitfit_adapter",)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self._before: dict[str, Tensor] = {}  # what each merged adapter was added to

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output (..., d_out) with what is added to the bias."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        output: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        for adapter in self._active():
            output = output + adapter(x, output, None).to(output.dtype)
        return output

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the trained numbers to the layer's bias, of a quantized layer too.

        Raises:
            ValueError: The layer has no bias of its own, or (`safe_merge`) the result is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapters]
        for name in names:
            bias = self.own_bias(name)
            self._before[name] = bias.data
            merged = bias.data + self.adapters[name].bias.to(bias.dtype)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(f"merging {name!r} gives biases that are not finite: the adapter is broken.")
            bias.data = merged  # a new tensor: what shares the old one stays as it is
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts back the biases as they were."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            bias = self.own_bias(name)
            bias.data = self._before.pop(name).to(bias)

    def own_bias(self, name: str) -> Tensor:
        """The bias (d_out,) of the base layer.

        Raises:
            ValueError: It has none.
        """
        bias: Any = self.get_base_layer().bias
        if bias is None:
            raise ValueError(
                f"adapter {name!r} added biases (add_bias=True), and the model has no place for them, so it cannot be "
                "merged. Keep it as an adapter."
            )
        own: Tensor = bias
        return own


class BitFitModel(LinearAdapterTuner):
    """Trains biases of a model."""

    prefix = "bitfit_"
    tuner_layer_cls = BitFitLinear
    config_class = BitFitConfig

    def _targets(self, model: nn.Module, config: BitFitConfig) -> dict[str, BaseLinear]:
        if config.target_modules is None:
            config.target_modules = _find_biases(model, config)
        names = [name for name, _ in model.named_modules() if ".base_layer" not in name]
        names = [name for name in names if name and check_target_module_exists(config, name)]
        if not names:
            return super()._targets(model, config)  # which says what there is
        for name in names:
            if not _has_place(without_adapters(model.get_submodule(name)), config):
                raise ValueError(
                    f"{name} has no bias to train: leave it out, or give linear layers biases with add_bias=True."
                )
        return {}

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
        layer = target if isinstance(target, BitFitLinear) else BitFitLinear(target, adapter_name)
        layer.add(adapter_name, BitFit(_width(layer.get_base_layer())), peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        """Refuses before the first layer changes, not at the first layer that cannot be merged."""
        super()._check_merge_allowed()
        for module in self.model.modules():
            if isinstance(module, BitFitLinear):
                for name in module.active_adapters:
                    if name in module.adapters:
                        module.own_bias(name)


def _find_biases(model: nn.Module, config: BitFitConfig) -> set[str]:
    """The layers whose biases the config means, where it names none."""
    if config.biases == "query_mlp":
        names = {name for part in find_feedforward(model) for name in part.inputs}
        for attention in find_attention(model):
            queries = [name for name in attention.inputs if name.rpartition(".")[2].startswith("q")]
            names.update(queries or attention.inputs[:1])
    else:
        probe: Any = copy.copy(config)
        probe.target_modules = "all-linear"
        _maybe_include_all_linear_layers(probe, model)
        names = set(probe.target_modules)
        names = {name for name in names if not _is_norm(without_adapters(model.get_submodule(name)))}
        if config.biases == "all":
            inside = [name for name, module in model.named_modules() if ".base_layer" not in name]
            names.update(name for name in inside if _is_norm(without_adapters(model.get_submodule(name))))
    found = {name for name in names if _has_place(without_adapters(model.get_submodule(name)), config)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no biases to train (biases={config.biases!r}): add_bias=True gives its linear "
            "layers some."
        )
    return in_chosen_blocks(model, found, config)


def _is_norm(layer: nn.Module) -> bool:
    """Whether a layer scales and shifts each feature."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    return isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.ndim == 1 and weight.shape == bias.shape


def _has_place(layer: nn.Module, config: BitFitConfig) -> bool:
    return _is_norm(layer) or (is_linear(layer) and (config.add_bias or layer.bias is not None))


def _width(layer: nn.Module) -> int:
    return linear_of(layer).out_features if is_linear(layer) else len(layer.bias)  # type: ignore[arg-type]
