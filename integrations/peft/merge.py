"""Merges adapters into the weights, right for every PEFT type on every quantized base.

PEFT merges into `base_layer.weight`, which for packed weights fails or, for several types, is silently wrong. Here
each adapted layer is made dense in float32 inside the PEFT model, merged by its own type's `merge`, and then rounded
once: to the model's dtype, or to the format of the base.
"""

import logging
import math
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_efficiency.calibration.structure import replace_module
from hf_efficiency.integrations.peft.prepare import undo_preparation
from hf_efficiency.integrations.transformers.quantizer import dense_layer
from hf_efficiency.quantization.layers.base import QuantizedLinear
from hf_efficiency.quantization.requantize import exact_weight
from hf_efficiency.quantization.requantize import requantize as requantized
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper

logger = logging.getLogger(__name__)


def merge_adapters(
    model: PeftModel | PeftMixedModel, requantize: bool = False, adapter_names: list[str] | None = None
) -> PreTrainedModel:
    """Merges the adapters of a PEFT model into its weights and returns the base model without them.

    The base may be dense or hold any of our storage layers. Without `requantize` the result is an ordinary dense model
    in the model's dtype: each merged weight is computed in float32 and rounded once. With `requantize` the layers that
    were merged into are stored again in the format of the base, by rounding to nearest; the log then says how far that
    moved the weights, and how much of the adapters' change it took away. The model passed in is used up.

    Args:
        model: From `get_peft_model` or `PeftModel.from_pretrained`.
        requantize: Keep the base packed.
        adapter_names: Adapters to merge, in this order; by default the active ones.

    Raises:
        TypeError: If `model` is no PEFT model.
        ValueError: If a type can't be merged (prefix, prompt, bottleneck ...), an adapter is unknown or not finite, or
            there is nothing to requantize. The model is then as it was.
    """
    if not isinstance(model, PeftModel | PeftMixedModel):
        raise TypeError(
            "merge_adapters takes a PEFT model (get_peft_model, PeftModel.from_pretrained), not "
            f"{type(model).__name__}."
        )
    names = _adapter_names(model, adapter_names)
    tuner = _tuner(model, names)
    layers = [layer for layer in tuner.model.modules() if isinstance(layer, BaseTunerLayer)]
    _check_layers(layers, names)
    chosen = _chosen_copies(tuner.model, names)
    if requantize and not any(isinstance(layer.get_base_layer(), QuantizedLinear) for layer in layers):
        raise ValueError("requantize=True, but no adapted layer is quantized: merge without it.")
    merge = _Merge(requantize, names, shared=_shared_parameters(tuner.model))
    try:
        for layer in layers:
            merge.into(layer)
    except BaseException:
        merge.undo()
        raise
    for wrapper, name in chosen.items():
        # `unload` keeps the active copy, or the original where there is none.
        wrapper._active_adapter = name or []  # type: ignore[assignment]  # PEFT itself puts a name or a list there
    base: Any = tuner.unload()
    undo_preparation(base)
    _finish(base, merge)
    return base


def _adapter_names(model: PeftModel | PeftMixedModel, given: list[str] | None) -> list[str]:
    """The adapters to merge, all known."""
    if isinstance(given, str):
        raise TypeError(f"adapter_names={given!r} must be a list of names, such as [{given!r}].")
    active = model.active_adapter
    names = list(given) if given is not None else [active] if isinstance(active, str) else list(active)
    unknown = [name for name in names if name not in model.peft_config]
    if unknown or not names:
        raise ValueError(
            f"adapter_names={names} must name adapters of the model, which has {', '.join(model.peft_config)}."
        )
    return names


def _tuner(model: PeftModel | PeftMixedModel, names: list[str]) -> BaseTuner:
    """The module that holds the adapted model. ValueError for types that change no weights."""
    tuner: Any = model.base_model
    for name in names:
        config = model.peft_config[name]
        if config.is_prompt_learning or not isinstance(tuner, BaseTuner):
            raise ValueError(
                f"adapter {name!r} is of type {_kind(config)}, which changes no weights, so there is nothing to merge: "
                "keep it beside the model (save_pretrained) and load it with PeftModel.from_pretrained."
            )
        if getattr(config, "layer_replication", None):
            raise ValueError(f"adapter {name!r} replicates layers of the model, which have one weight to merge into.")
    return tuner


def _kind(config: object) -> str:
    kind = getattr(config, "peft_type", None)
    return str(getattr(kind, "value", kind))


def _check_layers(layers: list[BaseTunerLayer], names: list[str]) -> None:
    """ValueError for layers that can't be merged, before anything changes."""
    for layer in layers:
        if type(layer).merge is BaseTunerLayer.merge:
            raise ValueError(
                f"{type(layer).__name__} can't be merged into a weight: keep the adapter beside the model "
                "(save_pretrained) and load it with PeftModel.from_pretrained."
            )
        if layer.merged and isinstance(layer.get_base_layer(), QuantizedLinear):
            raise ValueError(
                "PEFT's own merge was called on a quantized layer, which it gets wrong. Load base and adapter again "
                "and call merge_adapters alone."
            )
    for layer in layers:
        for part in layer.adapter_layer_names:
            holder: Any = getattr(layer, part, None)
            for name in names if hasattr(holder, "keys") else []:
                if name in holder.keys() and not _finite(holder[name]):  # noqa: SIM118  # not all are mappings
                    raise ValueError(f"adapter {name!r} holds NaN or infinity in {part}: it is broken, train it again.")


def _finite(part: object) -> bool:
    tensors = part.parameters() if isinstance(part, nn.Module) else [part] if isinstance(part, Tensor) else []
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point() and not t.is_meta)


def _chosen_copies(model: nn.Module, names: list[str]) -> dict[ModulesToSaveWrapper, str | None]:
    """Whose copy of each module in `modules_to_save` stays; None where none of the adapters has one."""
    chosen: dict[ModulesToSaveWrapper, str | None] = {}
    for where, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            owners = [name for name in names if name in wrapper.modules_to_save]
            if len(owners) > 1:
                raise ValueError(
                    f"adapters {' and '.join(map(repr, owners))} each bring a copy of {where} (modules_to_save), and "
                    "only one can stay: merge one of them."
                )
            chosen[wrapper] = owners[0] if owners else None
    return chosen


def _shared_parameters(model: nn.Module) -> set[int]:
    """ids of parameters that several modules hold (tied heads)."""
    counts = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {key for key, count in counts.items() if count > 1}


@dataclass
class _Merge:
    """What was merged so far, and how to take it back.

    Attributes:
        requantize: Store merged weights in the base's format.
        names: The adapters.
        shared: ids of parameters that must not be changed in place.
        packed: Dense modules by id, with the storage layer each stands for.
        rounding, change, weight: Squared norms over all requantized weights.
        worst: Largest relative rounding error of a layer.
    """

    requantize: bool
    names: list[str]
    shared: set[int]
    packed: dict[int, QuantizedLinear] = field(default_factory=dict)
    rounding: float = 0.0
    change: float = 0.0
    weight: float = 0.0
    worst: float = 0.0
    _undo: list[tuple[BaseTunerLayer, Any, nn.Module, list[str]]] = field(default_factory=list)

    def into(self, layer: BaseTunerLayer) -> None:
        """Merges one layer's adapters."""
        holder: Any = layer
        while isinstance(holder.base_layer, BaseTunerLayer):
            holder = holder.base_layer
        base = holder.base_layer
        self._undo.append((layer, holder, base, list(layer.merged_adapters)))
        if isinstance(base, QuantizedLinear):
            holder.base_layer = _exact_linear(base)
            layer.quantization_backend = None
        elif any(id(p) in self.shared for p in base.parameters(recurse=False)):
            holder.base_layer = _with_own_parameters(base)
        with warnings.catch_warnings():  # PEFT says so where another adapter was merged before
            warnings.filterwarnings("ignore", message="Already following adapters|All adapters are already merged")
            layer.merge(adapter_names=self.names)
        if isinstance(base, QuantizedLinear):
            holder.base_layer = self._stored(base, holder.base_layer)

    def _stored(self, old: QuantizedLinear, merged: nn.Linear) -> nn.Module:
        """The merged layer as it stays."""
        weight: Tensor = merged.weight.detach()
        bias = None if merged.bias is None else merged.bias.detach()
        if self.requantize:
            new = requantized(old, weight, bias)
            self._record(exact_weight(old), weight, exact_weight(new))
            return new
        merged.to(old.compute_dtype)
        self.packed[id(merged)] = old
        return merged

    def _record(self, before: Tensor, wanted: Tensor, stored: Tensor) -> None:
        rounding, weight = float((stored - wanted).square().sum()), float(wanted.square().sum())
        self.rounding += rounding
        self.weight += weight
        self.change += float((wanted - before).square().sum())
        self.worst = max(self.worst, math.sqrt(rounding / weight) if weight else 0.0)

    def undo(self) -> None:
        """Puts everything back as it was."""
        for layer, holder, base, merged in reversed(self._undo):
            if holder.base_layer is base and len(layer.merged_adapters) > len(merged):
                layer.unmerge()
            holder.base_layer = base
            layer.merged_adapters = merged


def _exact_linear(layer: QuantizedLinear) -> nn.Linear:
    """The float32 `nn.Linear` that a storage layer stands for. PEFT adapted it as one, even where it was a `Conv1D`."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(exact_weight(layer), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
    return linear


def _with_own_parameters(module: nn.Module) -> nn.Module:
    """The same module with copies of its parameters, so that what it shared with others stays."""
    own = module.__new__(type(module))
    own.__dict__.update(module.__dict__)
    own._parameters = {
        name: None if p is None else nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
        for name, p in module._parameters.items()
    }
    return own


def _finish(base: PreTrainedModel, merge: _Merge) -> None:
    """Makes the rest dense too, and the config say what the model now is."""
    if merge.requantize:
        logger.warning(
            "Merged weights were rounded to the base's format: relative error %.3g over all of them (%.3g in the worst "
            "layer), where the adapters had changed them by %.3g.",
            math.sqrt(merge.rounding / merge.weight) if merge.weight else 0.0,
            merge.worst,
            math.sqrt(merge.change / merge.weight) if merge.weight else 0.0,
        )
    else:
        for name, module in list(base.named_modules()):
            if isinstance(module, QuantizedLinear):
                replace_module(base, name, dense_layer(module))
            elif isinstance(module, nn.Linear) and id(module) in merge.packed and merge.packed[id(module)].conv1d:
                replace_module(base, name, _as_conv1d(module, merge.packed[id(module)]))
        quantizer = getattr(base, "hf_quantizer", None)
        if quantizer is not None:
            quantizer.remove_quantization_config(base)
    _untie_config(base)


def _as_conv1d(linear: nn.Linear, packed: QuantizedLinear) -> nn.Module:
    """The `Conv1D` of a merged layer that the model has one for."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        conv = Conv1D(packed.out_features, packed.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
    conv.bias = linear.bias
    return conv


def _untie_config(base: PreTrainedModel) -> None:
    """`tie_word_embeddings=False` where head and embeddings are two tensors now, or reloading would lose one."""
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if head is not None and embeddings is not None and getattr(base.config, "tie_word_embeddings", False):
        base.config.tie_word_embeddings = head.weight is embeddings.weight
