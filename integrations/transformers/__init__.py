"""Quantization through `from_pretrained(..., quantization_config=...)`."""

from hf_efficiency.integrations.transformers.config import (
    AWQConfig,
    EfficiencyConfig,
    GPTQConfig,
    NF4Config,
    QuIPSharpConfig,
    RTNConfig,
)
from hf_efficiency.integrations.transformers.register import prefer, register

__all__ = [
    "AWQConfig",
    "EfficiencyConfig",
    "GPTQConfig",
    "NF4Config",
    "QuIPSharpConfig",
    "RTNConfig",
    "prefer",
    "register",
]
