"""Quantizes dense weights one by one as a checkpoint is being read."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_efficiency.calibration.method import check_finite
from hf_efficiency.integrations.transformers.config import EfficiencyConfig
from hf_efficiency.quantization.layers.base import QuantizedLinear
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps


class QuantizeOnLoad(ConversionOps):
    """Turns one dense weight into the tensors of its storage layer as soon as it is read.

    Args:
        config: What to do.
        failures: Takes the messages of what went wrong, to be raised when all is read.
    """

    def __init__(self, config: EfficiencyConfig, failures: list[str]) -> None:
        self.config = config
        self.failures = failures

    def convert(  # type: ignore[override]  # the base class names arguments that a quantizer does not get
        self,
        input_dict: dict[str, Any],
        *,
        model: PreTrainedModel,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """One dense weight in, the storage layer's tensors out, under their full names."""
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        name = full_layer_name.removesuffix(".weight")
        layer = model.get_submodule(name)
        if not isinstance(layer, QuantizedLinear):
            raise TypeError(f"{name} is to be quantized but is a {type(layer).__name__} in the model.")
        filled = self.config.empty_layer(
            name,
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=layer.compute_dtype,
            device=weight.device,
            conv1d=layer.conv1d,
        )
        try:
            if not torch.isfinite(weight).all():
                raise ValueError(f"The weight of {name} holds NaN or infinity; the checkpoint is damaged.")
            self.config.quantize_weight(name, weight.T if layer.conv1d else weight, filled)
            check_finite(name, filled)
        except ValueError as error:
            # transformers would turn it into an error that says "look at the log".
            self.failures.append(str(error))
        _drop_placeholder(layer)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {f"{name}.{key}": tensor for key, tensor in filled.named_buffers()}


def add_placeholder(layer: QuantizedLinear) -> None:
    """Gives a storage layer on the meta device a dense `weight`, so that the loader finds where a dense one belongs."""
    layer._buffers.pop("weight", None)
    shape = (layer.in_features, layer.out_features) if layer.conv1d else (layer.out_features, layer.in_features)
    weight = torch.empty(shape, dtype=layer.compute_dtype, device="meta")
    # Not by attribute: `weight` is a property of storage layers.
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)


def leave_uninitialized(parent: nn.Module) -> None:
    """Keeps GPT-2's `_init_weights` from reaching through a module without own weights for `c_proj.weight`."""
    if not list(parent.parameters(recurse=False)):
        parent._is_hf_initialized = True  # type: ignore[assignment]  # a mark, no module


def _drop_placeholder(layer: QuantizedLinear) -> None:
    layer._parameters.pop("weight", None)
    declared = layer.declare()
    if "weight" in declared and "weight" not in layer._buffers:
        shape, dtype = declared["weight"]
        layer.register_buffer("weight", torch.empty(shape, dtype=dtype, device="meta"))
