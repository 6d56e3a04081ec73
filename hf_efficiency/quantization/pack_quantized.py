"""Reads llm-compressor's `pack-quantized` checkpoints into affine storage layers."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_efficiency.calibration.method import BlockMethod
from hf_efficiency.quantization.compressed_tensors import PackQuantizedConfig
from hf_efficiency.quantization.layers.affine import AffineLinear
from hf_efficiency.quantization.layers.base import QuantizedLinear


@dataclass(kw_only=True)
class PackQuantized(BlockMethod):
    """A checkpoint's own `quantization_config`, which says for each layer how it is stored.

    Attributes:
        config: The `quantization_config` of a compressed-tensors checkpoint.
    """

    calibrated: ClassVar[bool] = False

    config: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """ValueError for what is not weight-only integer `pack-quantized`."""
        PackQuantizedConfig.from_dict(self.config)

    def empty_layer(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        compute_dtype: torch.dtype,
        device: torch.device | str | None,
        conv1d: bool,
    ) -> QuantizedLinear:
        """The layer called `name`, in the layout that the config gives it."""
        scheme = PackQuantizedConfig.from_dict(self.config).scheme_for(name)
        if scheme is None:
            raise ValueError(f"{name} is packed in the checkpoint, but its quantization_config leaves it dense.")
        return AffineLinear(
            in_features,
            out_features,
            bits=scheme.bits,
            group_size=scheme.group_size,
            layout=scheme.layout(),
            bias=bias,
            compute_dtype=compute_dtype,
            device=device,
            conv1d=conv1d,
        )

    def quantize_weight(self, name: str, weight: Tensor, layer: QuantizedLinear) -> None:
        """This class reads only."""
        raise ValueError("PackQuantizedConfig only reads checkpoints; quantize with GPTQConfig or RTNConfig.")
