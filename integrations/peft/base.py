"""The PEFT side of every adapter of linear layers: one config, one tuner layer, one tuner.

A new type is a subclass of each (see `dvora.py`) and a line in `register.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_efficiency.adapters.base import BaseLinear, LinearAdapter
from hf_efficiency.adapters.sublayers import block_names
from hf_efficiency.adapters.targets import no_match
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils.integrations import dequantize_module_weight

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass
class LinearAdapterConfig(PeftConfig):
    """What the configs of all our adapters share.

    Args:
        target_modules: Names (or their endings) of the adapted layers, a regular expression for whole names, or
            `"all-linear"` (the default): every linear layer but the output head.
        exclude_modules: Names or a regular expression of layers that are left out.
        layers_to_transform: Indices of the blocks that are adapted; all by default.
        layers_pattern: Name of the list of blocks, where `layers_to_transform` needs it.
        modules_to_save: Other modules that are trained and saved whole.
    """

    # The type's name and the prefix of its parameters; set by each type.
    kind: ClassVar[Any] = None
    # The field that is a rank of the layer's matrix, where the type has one.
    rank_field: ClassVar[str | None] = None

    target_modules: list[str] | set[str] | str | None = field(default="all-linear")
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.kind
        if self.target_modules is None:
            self.target_modules = "all-linear"
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        pattern = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if pattern and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform does not go with a regular expression in target_modules.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern without layers_to_transform has no effect: give both or none.")

    def check_layer(self, name: str, base: BaseLinear) -> None:
        """Raises a ValueError that names the layer if this type cannot sit on it. Called before anything changes."""
        if self.rank_field is not None:
            check_rank(name, getattr(self, self.rank_field), base)


def check_positive(owner: object, **values: float) -> None:
    """Raises a ValueError for the first of `values` that is not above zero."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{type(owner).__name__}: {name}={value} must be above 0.")


def check_dropout(owner: object, **values: float) -> None:
    """Raises a ValueError for the first of `values` that is no probability below 1."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{type(owner).__name__}: {name}={value} must be in [0, 1).")


def check_rank(name: str, r: int, base: BaseLinear) -> None:
    """Raises a ValueError if the rank is above what the layer's matrix can have."""
    bound = min(base.in_features, base.out_features)
    if r > bound:
        raise ValueError(
            f"r={r} is above {bound}, the rank of {name} ({base.out_features} x {base.in_features}): choose a smaller "
            "r or leave the layer out with exclude_modules."
        )


def in_chosen_blocks(model: nn.Module, names: Iterable[str], config: LinearAdapterConfig) -> set[str]:
    """Those of the names that lie in the blocks of `layers_to_transform`; all where it is None.

    PEFT itself ignores that field for layers that are named in full, as what is found by structure is.

    Raises:
        ValueError: There are none.
    """
    wanted = config.layers_to_transform
    if wanted is None:
        return set(names)
    blocks = block_names(model)
    indices = {wanted} if isinstance(wanted, int) else set(wanted)
    prefixes = tuple(f"{block}." for index, block in enumerate(blocks) if index in indices)
    chosen = {name for name in names if name.startswith(prefixes)}
    if not chosen:
        raise ValueError(
            f"layers_to_transform={wanted!r} names no block of the model, which has {len(blocks)}, from 0."
        )
    return chosen


class AdapterLinear(nn.Module, BaseTunerLayer):
    """A linear layer with adapters on it. Each type has a subclass whose `adapter_layer_names` is its own."""

    other_param_names = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())

    @property
    def adapters(self) -> Any:
        """The adapters by name: a ModuleDict of `LinearAdapter`."""
        return getattr(self, self.adapter_layer_names[0])

    @property
    def in_features(self) -> int:
        """d_in of the base layer."""
        return linear_of(self.get_base_layer()).in_features

    @property
    def out_features(self) -> int:
        """d_out of the base layer."""
        return linear_of(self.get_base_layer()).out_features

    def add(self, adapter_name: str, adapter: LinearAdapter, inference_mode: bool) -> None:
        """Puts an adapter on the layer, in place of one of the same name."""
        self.adapters[adapter_name] = adapter
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output (..., d_out) with what the active adapters add, in the dtype of the layer's own output."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        base = linear_of(self.get_base_layer())
        total = output
        for adapter in self._active():
            dtype = _dtype_of(adapter, x.dtype)
            total = total + adapter(x.to(dtype), output.to(dtype), base).to(output.dtype)
        return total

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the adapters into the base layer's weight.

        Raises:
            ValueError: The type has no merged form, the layer is quantized, or (`safe_merge`) the result is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.adapters:
                continue
            adapter = self.adapters[name]
            self._check_mergeable(name, adapter)
            weight = adapter.merged_weight(self._dense_weight())
            if safe_merge and not bool(torch.isfinite(weight).all()):
                raise ValueError(f"merging {name!r} gives weights that are not finite: the adapter is broken.")
            self._set_dense_weight(weight)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the adapters out of the weight again, up to rounding."""
        while self.merged_adapters:
            adapter = self.adapters[self.merged_adapters.pop()]
            self._set_dense_weight(adapter.unmerged_weight(self._dense_weight()))

    def _active(self) -> Iterator[LinearAdapter]:
        for name in self.active_adapters:
            if name in self.adapters:
                yield self.adapters[name]

    def _check_mergeable(self, name: str, adapter: LinearAdapter) -> None:
        if not adapter.mergeable:
            raise ValueError(
                f"adapter {name!r} is a {type(adapter).__name__}: what it computes is no change of the weight, so it "
                "cannot be merged. Keep it as an adapter."
            )
        if _is_quantized(self.get_base_layer()):
            raise ValueError(
                f"adapter {name!r} sits on a quantized layer ({type(self.get_base_layer()).__name__}), whose weight "
                "cannot be changed: use hf_efficiency.merge_adapters(model)."
            )

    def _dense_weight(self) -> Tensor:
        return linear_of(self.get_base_layer()).weight()

    def _set_dense_weight(self, weight: Tensor) -> None:
        layer = self.get_base_layer()
        layer.weight.data = weight.T.contiguous() if isinstance(layer, Conv1D) else weight


class LinearAdapterTuner(BaseTuner):
    """Puts one type of adapter into a model."""

    tuner_layer_cls: type[AdapterLinear]
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (as the base class declares it)
    config_class: type[LinearAdapterConfig]

    def make_shared(self, config: Any, layers: dict[str, BaseLinear]) -> Any:
        """What all layers of an adapter share; `layers` are those that it will sit on."""
        return None

    def make_adapter(self, config: Any, base: BaseLinear, name: str, shared: Any) -> LinearAdapter:
        """The adapter of one layer."""
        raise NotImplementedError

    def check_targets(self, model: nn.Module, config: Any, layers: dict[str, BaseLinear]) -> None:
        """Raises a ValueError for layers that this type cannot sit on as they stand in the model."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts an adapter into the model. `_pre_injection_hook` would be too early: PEFT runs it for the first only."""
        config: Any = self.peft_config[adapter_name]
        layers = self._targets(model, config)
        for name, base in layers.items():
            config.check_layer(name, base)
        self.check_targets(model, config, layers)
        self._shared = self.make_shared(config, layers)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _targets(self, model: nn.Module, config: Any) -> dict[str, BaseLinear]:
        """The layers that match, by name; bad targets are refused here, before the model changes."""
        if config.target_modules == "all-linear":
            _maybe_include_all_linear_layers(config, model)
            config.target_modules = in_chosen_blocks(model, config.target_modules, config)
        modules = {
            name: module
            for name, module in model.named_modules()
            if name and ".base_layer" not in name and check_target_module_exists(config, name)
        }
        if not modules:
            linears = [name for name, module in model.named_modules() if is_linear(module)]
            raise ValueError(no_match(config.target_modules, linears))
        for name, module in modules.items():
            layer = without_adapters(module)
            if not is_linear(layer):
                raise ValueError(
                    f"{config.peft_type.value} adapts linear layers, and {name} is a {type(layer).__name__}: "
                    "change target_modules or exclude it with exclude_modules."
                )
        return {name: linear_of(module) for name, module in modules.items()}

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
        adapter = self.make_adapter(peft_config, linear_of(target), current_key, self._shared)
        inference = peft_config.inference_mode
        if isinstance(target, self.tuner_layer_cls):
            target.add(adapter_name, adapter, inference)
            return
        layer = self.tuner_layer_cls(target, adapter_name)
        layer.add(adapter_name, adapter, inference)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The name of a tensor in a checkpoint. PEFT looks for the adapter's name at the end only."""
        holder = f".{cls.tuner_layer_cls.adapter_layer_names[0]}."
        path, found, rest = key.rpartition(f"{holder}{adapter_name}.")
        if found:
            return f"{path}{holder}{rest}"
        name: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return name

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors of a checkpoint under the model's names.

        Raises:
            ValueError: They are not those that the adapter has on this model. PEFT itself would leave what is missing
                untrained and say nothing.
        """
        tensors: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = model.state_dict()
        part = f".{cls.tuner_layer_cls.adapter_layer_names[0]}."
        _check_fits(
            {name: tuple(tensor.shape) for name, tensor in tensors.items() if part in name},
            {name: tuple(tensor.shape) for name, tensor in own.items() if f"{part}{adapter_name}." in name},
        )
        return tensors


def _check_fits(saved: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Compares the shapes of a checkpoint with those of the model, by name."""
    unknown, missing = sorted(saved.keys() - wanted.keys()), sorted(wanted.keys() - saved.keys())
    shapes = sorted(name for name in saved.keys() & wanted.keys() if saved[name] != wanted[name])
    reasons = []
    if unknown:
        reasons.append(f"{len(unknown)} of its tensors belong to layers that are not adapted here ({unknown[0]})")
    if missing:
        reasons.append(f"{len(missing)} tensors are missing from it ({missing[0]})")
    if shapes:
        name = shapes[0]
        reasons.append(f"{len(shapes)} tensors have another shape ({name}: {saved[name]} saved, {wanted[name]} here)")
    if reasons:
        raise ValueError(
            f"the adapter was made for another model or config: {'; '.join(reasons)}. Load it onto the base that its "
            "adapter_config.json names, with that config."
        )


def without_adapters(module: nn.Module) -> nn.Module:
    """The layer under the adapters, or the module itself where there are none."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer multiplies by a matrix, dense or quantized."""
    return isinstance(layer, nn.Linear | Conv1D)


def linear_of(module: nn.Module) -> BaseLinear:
    """A layer, dense or quantized, `nn.Linear` or GPT-2's `Conv1D`, with or without adapters on it."""
    layer: Any = without_adapters(module)
    if isinstance(layer, Conv1D):
        d_in, d_out = layer.weight.shape
        return BaseLinear(lambda: layer.weight.detach().T, layer.bias, d_in, d_out)
    return BaseLinear(
        lambda: dequantize_module_weight(layer).detach(), layer.bias, layer.in_features, layer.out_features
    )


def _is_quantized(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return not (isinstance(weight, nn.Parameter) and weight.is_floating_point()) or hasattr(layer, "W_q")


def _dtype_of(adapter: nn.Module, default: torch.dtype) -> torch.dtype:
    return next((p.dtype for p in adapter.parameters() if p.is_floating_point()), default)
