"""The one `HfQuantizer` behind all our methods and all formats that we read.

Three ways in: quantize while loading (data-free methods, tensor by tensor), quantize after loading (methods that need
data), and read a quantized checkpoint.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficiency.calibration.data import needs_tokenizer, resolve_calibration
from hf_efficiency.calibration.engine import run_blockwise
from hf_efficiency.calibration.structure import (
    find_blocks,
    is_conv1d,
    linear_sizes,
    linears_of,
    replace_module,
    warn_of_fused_weights,
)
from hf_efficiency.integrations.transformers.bnb_format import bnb_weight_conversions, read_quant_states
from hf_efficiency.integrations.transformers.checkpoint import CheckpointIndex, read_shapes
from hf_efficiency.integrations.transformers.config import EfficiencyConfig, NF4Config
from hf_efficiency.integrations.transformers.foreign import to_ours
from hf_efficiency.integrations.transformers.on_load import QuantizeOnLoad, add_placeholder, leave_uninitialized
from hf_efficiency.quantization.formats import default_g_idx
from hf_efficiency.quantization.layers.affine import AffineLinear
from hf_efficiency.quantization.layers.base import QuantizedLinear
from hf_efficiency.quantization.layers.lut import LUTLinear
from transformers import AutoTokenizer, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightTransform
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

_NAMED = 3  # layers that a message gives as examples


def _is_part(name: str, keys: Iterable[str]) -> bool:
    """Whether a key names a module on the path to `name` (`self_attn`, say), which transformers does not look for."""
    return any(f".{key}." in f".{name}." for key in keys)


class EfficiencyQuantizer(HfQuantizer):
    """Quantizes, loads, saves and dequantizes models for every config of hf_efficiency."""

    quantization_config: EfficiencyConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(to_ours(quantization_config), **kwargs)
        self.quantization_config.validate()
        self._without_g_idx: set[str] = set()
        self._file_shapes: dict[str, tuple[int, ...]] = {}
        self._tokens: Tensor | None = None
        self._failures: list[str] = []

    @property
    def _on_load(self) -> bool:
        """Whether weights are quantized one by one as they are read."""
        return not self.pre_quantized and not self.quantization_config.needs_calibration

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """ValueError where a method that calibrates is asked to work on weights that are offloaded."""
        if self.quantization_config.needs_calibration and not self.pre_quantized and isinstance(device_map, dict):
            away = {str(d) for d in device_map.values()} & {"disk", "meta"}
            if away:
                raise ValueError(
                    f"device_map puts weights on {', '.join(away)}, where they can't be calibrated. Load to the CPU or "
                    "a GPU, quantize, save, and offload the smaller model."
                )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        compute_dtype = torch.get_default_dtype()
        config.compute_dtype = compute_dtype  # type: ignore[misc]  # shadows the class's default
        linears = self._stored_linears(model, checkpoint_files) if self.pre_quantized else self._targets(model)
        layers = {}
        for name, linear in linears.items():
            in_features, out_features = linear_sizes(linear)
            layers[name] = config.empty_layer(
                name,
                in_features,
                out_features,
                bias=linear.bias is not None,
                compute_dtype=compute_dtype,
                device="meta",
                conv1d=is_conv1d(linear),
            )
        if self.pre_quantized:
            if isinstance(config, NF4Config):
                tables = {name: layer for name, layer in layers.items() if isinstance(layer, LUTLinear)}
                read_quant_states(tables, checkpoint_files or [], model.base_model_prefix)
            self._check_checkpoint(model, layers)
        if self._on_load:  # what calibrates warns by itself
            warn_of_fused_weights(*find_blocks(model))
        elif not self.pre_quantized and config.calibration != "self":  # bad data shows before anything is loaded
            with torch.device("cpu"):  # the model is being made on the meta device
                self._tokens = self._calibration_tokens(model)
        if self.pre_quantized or self._on_load:
            for name, layer in layers.items():
                if self._on_load:
                    add_placeholder(layer)
                replace_module(model, name, layer)
                leave_uninitialized(model.get_submodule(name.rpartition(".")[0]))

    def _targets(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Linear layers inside the blocks that are to be quantized, by name."""
        config = self.quantization_config
        skip = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, list(model._keep_in_fp32_modules or []), add_default_skips=True
        )
        config.skipped_modules = sorted(skip)  # type: ignore[misc]  # shadows the class's default
        prefix, blocks = find_blocks(model)
        linears = linears_of(prefix, blocks)
        self._check_names(model, linears)
        targets = {
            name: linear
            for name, linear in linears.items()
            if should_convert_module(name, skip) and not _is_part(name, skip) and not config.skips(name)
        }
        if not targets:
            raise ValueError(
                f"No linear layer of {type(model).__name__} is left to quantize: `modules_to_not_convert` and "
                "`dynamic` exclude them all."
            )
        return targets

    def _check_names(self, model: PreTrainedModel, linears: Iterable[str]) -> None:
        """ValueError for a name or pattern of the config that stands for nothing in the model."""
        config, names = self.quantization_config, [name for name, _ in model.named_modules()]
        idle = {
            "modules_to_not_convert": [
                key
                for key in config.modules_to_not_convert or []
                if all(should_convert_module(name, [key]) and not _is_part(name, [key]) for name in names)
            ],
            "dynamic": [
                pattern
                for pattern in getattr(config, "dynamic", None) or {}
                # What is skipped may lie outside the blocks, such as the head.
                if not any(
                    re.match(pattern[2:] if pattern[:2] in ("-:", "+:") else pattern, name)
                    for name in (names if pattern.startswith("-:") else linears)
                )
            ],
        }
        for option, lost in idle.items():
            if lost:
                raise ValueError(
                    f"{option} names {', '.join(map(repr, lost))}, but {type(model).__name__} has no layer called so. "
                    f"Its layers are called like {', '.join(list(linears)[:_NAMED])}: correct the name or remove it."
                )

    def _stored_linears(self, model: PreTrainedModel, files: list[str] | None) -> dict[str, nn.Module]:
        """Linear layers that the checkpoint holds in packed form: what has no dense weight there."""
        self._file_shapes = read_shapes(files)
        index = CheckpointIndex(self._file_shapes, model.base_model_prefix)
        marks = self.quantization_config.packed_names
        linears = linears_of("", model)
        found = {n: m for n, m in linears.items() if any(f"{n}.{mark}" in index for mark in marks)}
        prefix, blocks = find_blocks(model)
        lost = [n for n in linears_of(prefix, blocks) if n not in found and f"{n}.weight" not in index]
        if lost or not found:
            where = lost[0] if lost else f"{prefix}.0"
            raise ValueError(
                f"The checkpoint holds no weight for {where} ({' or '.join(sorted(marks))} expected). It is "
                "incomplete, or its quantization_config belongs to another file."
            )
        return found

    def _check_checkpoint(self, model: PreTrainedModel, layers: dict[str, QuantizedLinear]) -> None:
        index = CheckpointIndex(self._file_shapes, model.base_model_prefix)
        for name, layer in layers.items():
            expected = self.quantization_config.stored_shapes(layer)
            if "g_idx" in index.check(name, expected):
                self._without_g_idx.add(name)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """True for dense weights that are quantized as they are read."""
        module, tensor = get_module_from_name(model, param_name)
        return self._on_load and tensor == "weight" and isinstance(module, QuantizedLinear)

    def get_quantize_ops(self) -> ConversionOps:
        """What turns a dense weight into stored tensors."""
        return QuantizeOnLoad(self.quantization_config, self._failures)

    def get_weight_conversions(self) -> list[WeightTransform]:
        """Renamings between file and module, for formats whose tensor names hold dots."""
        if isinstance(self.quantization_config, NF4Config):
            return bnb_weight_conversions(self.quantization_config.quant_type)
        return []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        if self._failures:
            raise ValueError(self._failures[0])
        if not self.pre_quantized and config.needs_calibration:
            self._calibrate(model)
            self._tokens = None
        for name in self._without_g_idx:
            layer = model.get_submodule(name)
            if isinstance(layer, AffineLinear):
                layer.g_idx = default_g_idx(layer.in_features, layer.group_size, layer.W_q.device)
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.prepare()
                if self.pre_quantized and isinstance(module, AffineLinear) and module.permuted():
                    config.permuted = True  # type: ignore[misc]  # shadows the class's default
        self.quantization_config = config.without_run_fields()
        model.config.quantization_config = self.quantization_config
        return model

    def _calibrate(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        prefix, blocks = find_blocks(model)
        run_blockwise(
            model,
            self._tokens if self._tokens is not None else self._calibration_tokens(model),
            config,
            skip=linears_of(prefix, blocks).keys() - self._targets(model).keys(),
            batch_size=config.batch_size,
            offload=config.offload,
            resume_dir=config.resume_dir,
            progress=config.progress,
        )

    def _calibration_tokens(self, model: PreTrainedModel) -> Tensor:
        config = self.quantization_config
        return resolve_calibration(
            config.calibration,
            self._tokenizer(model),
            num_samples=config.num_samples,
            seq_len=config.seq_len,
            seed=config.seed,
            model=model,
        )

    def _tokenizer(self, model: PreTrainedModel) -> Any:
        """The config's tokenizer, or the one that lies beside the model."""
        config = self.quantization_config
        if not needs_tokenizer(config.calibration):
            return None
        given = config.tokenizer if config.tokenizer is not None else model.name_or_path
        if not isinstance(given, str):
            return given
        try:
            return AutoTokenizer.from_pretrained(given)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"calibration is text, but no tokenizer was found in {given!r}. Pass `tokenizer=` in the config, or "
                "give token ids."
            ) from error

    def is_serializable(self) -> bool:
        """Every format can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The forwards trace without graph breaks."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Puts dense layers back in the place of all storage layers."""
        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]:
            replace_module(model, name, dense_layer(layer, dtype))
        return model


def dense_layer(layer: QuantizedLinear, dtype: torch.dtype | None = None) -> nn.Module:
    """The dense layer, `nn.Linear` or `Conv1D`, that a storage layer stands for.

    Args:
        layer: The storage layer.
        dtype: dtype of its weights; the layer's own by default.
    """
    weight = layer.dequantize().to(dtype or layer.compute_dtype)
    bias = None if layer.bias is None else layer.bias.detach().to(weight.dtype)
    dense: nn.Module
    with torch.device("meta"):
        if layer.conv1d:
            dense = Conv1D(layer.out_features, layer.in_features)
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None)
    dense.weight = nn.Parameter(weight.T.contiguous() if layer.conv1d else weight)
    if bias is not None:
        dense.bias = nn.Parameter(bias)
    return dense
