"""bitsandbytes' 4-bit checkpoints in `transformers`: tensor names and `quantization_config`, without bitsandbytes.

In a file the tensors of a layer are called `weight`, `weight.absmax`, `weight.quant_map`, `weight.nested_absmax`,
`weight.nested_quant_map` and `weight.quant_state.bitsandbytes__nf4`. A module can't hold names with dots, so
`LUTLinear` drops the `weight.`, and keeps `nested_offset` of the JSON in `quant_state`. The transforms below translate
on loading, and `save_pretrained` runs them backwards, for models quantized on the fly and for reloaded ones alike.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hf_efficiency import __version__
from hf_efficiency.quantization.layers.lut import LUTLinear
from hf_efficiency.quantization.nf4 import NF4
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, WeightTransform

RENAMED = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_WRITER = "hf_efficiency:"  # start of the entry of `meta.quantizer` that says who wrote a file


class BnbRenaming(WeightRenaming):
    """`weight.<name>` of the file to `<name>` of the module."""

    __slots__ = ()

    def was_used(self) -> bool:
        """True: a model quantized on the fly matched none of these names, and must be saved under them all the same."""
        return True


class BnbQuantState(WeightConverter):
    """`weight.quant_state.bitsandbytes__<type>` of the file to `nested_offset` of the module."""

    __slots__ = ()

    def was_used(self) -> bool:
        """True, for the reason given in `BnbRenaming`."""
        return True


class ReadQuantState(ConversionOps):
    """JSON bytes to `nested_offset`; block size and table name go to the layer."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[Tensor]]:
        """One tensor in, one out, under its full name."""
        name = kwargs["full_layer_name"]
        layer = _layer(kwargs["model"], name.rpartition(".")[0])
        return {name: [layer.read_quant_state(_single(input_dict))]}

    @property
    def reverse_op(self) -> ConversionOps:
        """Writes the JSON."""
        return WriteQuantState()


class WriteQuantState(ConversionOps):
    """`nested_offset` to the JSON bytes that say how the layer is decoded."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[Tensor]]:
        """One tensor in, one out, under its full name in the file."""
        name = kwargs["full_layer_name"].rpartition(".weight.quant_state.")[0]
        layer = _layer(kwargs["model"], name)
        octets = layer.quant_state(_single(input_dict))
        return {f"{name}.weight.quant_state.bitsandbytes__{layer.quant_type}": [octets]}

    @property
    def reverse_op(self) -> ConversionOps:
        """Reads the JSON."""
        return ReadQuantState()


def bnb_weight_conversions(quant_type: str = "nf4") -> list[WeightTransform]:
    """What `HfQuantizer.get_weight_conversions` returns for a model of `LUTLinear` layers, quantized or being so."""
    renamings = [BnbRenaming(rf"\.weight\.{name}", rf"\.{name}") for name in RENAMED]
    state = BnbQuantState(
        rf"\.weight\.quant_state\.bitsandbytes__{quant_type}", r"\.nested_offset", operations=[ReadQuantState()]
    )
    return [*renamings, state]


def read_quant_states(layers: Mapping[str, LUTLinear], files: Iterable[str | Path], base_model_prefix: str) -> None:
    """Reads the JSON of every layer before the weights are loaded: block sizes are known, and damage shows early.

    Args:
        layers: Empty layers by module name.
        files: The safetensors files of the checkpoint.
        base_model_prefix: `model.base_model_prefix`, which keys of the file may lack or have in addition.

    Raises:
        ValueError: If the JSON of a layer can't be read or describes another weight; it names the layer.
    """
    prefix = f"{base_model_prefix}." if base_model_prefix else ""
    names: dict[str, str] = {}
    for name, layer in layers.items():
        key = f"{name}.weight.quant_state.bitsandbytes__{layer.quant_type}"
        names |= dict.fromkeys((key, key.removeprefix(prefix), prefix + key), name)
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for key in names.keys() & set(handle.keys()):
                try:
                    layers[names[key]].read_quant_state(handle.get_tensor(key))
                except ValueError as error:
                    raise ValueError(f"{names[key]}: {error}") from error


def to_bnb_config(
    method: NF4,
    compute_dtype: torch.dtype,
    skip_modules: list[str] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of config.json that bitsandbytes' loaders understand.

    Args:
        method: The arguments of the quantization.
        compute_dtype: dtype that the layers compute in.
        skip_modules: All modules that stay dense, the default ones too, for stock loaders take the list as it is; or
            None for the default ones.
        meta: What else made the file. `block_size` is kept there too, for which bitsandbytes has no key.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": method.quant_type,
        "bnb_4bit_use_double_quant": method.double_quant,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": method.quant_storage,
        "llm_int8_skip_modules": skip_modules,
        "meta": {"quantizer": [f"{_WRITER}{__version__}"], **(meta or {}), "block_size": method.block_size},
    }


def from_bnb_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `NF4`, and `modules_to_not_convert`, from a `quantization_config` of bitsandbytes.

    The block size is 64 unless we wrote the file; the layers take the true one from their `quant_state`.

    Raises:
        ValueError: If the checkpoint is not a 4-bit one.
    """
    if not config.get("load_in_4bit"):
        raise ValueError(
            "only 4-bit checkpoints of bitsandbytes are read here, this one has load_in_4bit=False: install "
            "bitsandbytes for LLM.int8()."
        )
    return {
        "block_size": (config.get("meta") or {}).get("block_size", 64),
        "double_quant": bool(config.get("bnb_4bit_use_double_quant", False)),
        "quant_type": config.get("bnb_4bit_quant_type", "fp4"),
        "quant_storage": str(config.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch."),
        "modules_to_not_convert": config.get("llm_int8_skip_modules"),
    }


def written_here(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` says in `meta.quantizer` that we wrote it."""
    writers = (config.get("meta") or {}).get("quantizer") or ()
    return any(str(writer).startswith(_WRITER) for writer in writers)


def _single(input_dict: dict[str, Any]) -> Tensor:
    """The only tensor of what a transform hands to its operation."""
    (value,) = input_dict.values()
    return value[0] if isinstance(value, list) else value


def _layer(model: PreTrainedModel, name: str) -> LUTLinear:
    """The layer called `name`."""
    layer = model.get_submodule(name)
    if not isinstance(layer, LUTLinear):
        raise ValueError(f"{name} holds a 4-bit weight in the file but is {type(layer).__name__} in the model.")
    return layer
