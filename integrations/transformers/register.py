"""Registers our quantizers with transformers, and takes over standard names whose own package is not installed."""

from importlib.util import find_spec
from typing import Any

from hf_efficiency.integrations.transformers.bnb_format import written_here
from hf_efficiency.integrations.transformers.config import (
    AWQConfig,
    EfficiencyConfig,
    GPTQConfig,
    NF4Config,
    PackQuantizedConfig,
    QuIPSharpConfig,
    RTNConfig,
)
from hf_efficiency.integrations.transformers.foreign import AwqConfig, BitsAndBytesConfig, CompressedTensorsConfig
from hf_efficiency.integrations.transformers.quantizer import EfficiencyQuantizer
from transformers.quantizers import auto
from transformers.utils.quantization_config import QuantizationConfigMixin

CONFIGS: tuple[type[EfficiencyConfig], ...] = (
    RTNConfig,
    GPTQConfig,
    AWQConfig,
    NF4Config,
    QuIPSharpConfig,
    PackQuantizedConfig,
)

# Standard name: (the package its stock loader needs, key in transformers' tables, our config).
_STANDARD: dict[str, tuple[str, str, type[EfficiencyConfig]]] = {
    "gptq": ("gptqmodel", "gptq", GPTQConfig),
    "awq": ("gptqmodel", "awq", AwqConfig),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes_4bit", BitsAndBytesConfig),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors", CompressedTensorsConfig),
}


def register() -> None:
    """Makes our configs known to `from_pretrained`. Doing it twice changes nothing.

    Of the standard formats, checkpoints that we wrote load with ours, so that logits stay the same to the bit; all
    others, too, where the format's own package is not installed.
    """
    for config in CONFIGS:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(config.default_name, config)
        auto.AUTO_QUANTIZER_MAPPING.setdefault(config.default_name, EfficiencyQuantizer)
    for name, (package, key, ours) in _STANDARD.items():
        if find_spec(package) is None:
            prefer(name)
        elif auto.AUTO_QUANTIZER_MAPPING[key] is not EfficiencyQuantizer:
            _parse_with(key, ours, always=False)


def prefer(name: str) -> None:
    """Lets hf_efficiency load all checkpoints of a standard format, even where the format's own package is installed.

    Args:
        name: `"gptq"`, `"awq"`, `"bitsandbytes"` (4 bit) or `"compressed-tensors"` (pack-quantized).

    Raises:
        ValueError: For another name.
    """
    if name not in _STANDARD:
        raise ValueError(f"prefer({name!r}): choose one of {', '.join(_STANDARD)}.")
    _, key, ours = _STANDARD[name]
    auto.AUTO_QUANTIZER_MAPPING[key] = EfficiencyQuantizer
    _parse_with(key, ours, always=True)


def _parse_with(key: str, ours: type[EfficiencyConfig], *, always: bool) -> None:
    """Puts a parser of `quantization_config` in the place of the stock one, which it calls for what is not ours."""
    mapping: dict[str, Any] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    stock = getattr(mapping[key], "stock", mapping[key])

    class Reader(QuantizationConfigMixin):
        """Reads a `quantization_config`; the class that the result has depends on who wrote it."""

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
            """Our config, or the stock one."""
            reader = ours if always or written_here(config_dict) else stock
            return reader.from_dict(config_dict, return_unused_kwargs, **kwargs)

    Reader.stock = stock  # type: ignore[attr-defined]
    mapping[key] = Reader
