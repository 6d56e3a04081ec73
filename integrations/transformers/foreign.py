"""Configs of other libraries, as our own: stock `GPTQConfig`, `AwqConfig`, `BitsAndBytesConfig`, compressed-tensors."""

from typing import Any

from hf_efficiency.integrations.transformers.config import (
    AWQConfig,
    EfficiencyConfig,
    GPTQConfig,
    NF4Config,
    PackQuantizedConfig,
)


# A script may pass a stock config along with a checkpoint that says by itself how it is quantized. transformers then
# compares the names of the two classes, so what is read from a standard format carries the stock name.
class AwqConfig(AWQConfig):
    """`AWQConfig`, read from a checkpoint."""


class BitsAndBytesConfig(NF4Config):
    """`NF4Config`, read from a checkpoint."""


class CompressedTensorsConfig(PackQuantizedConfig):
    """`PackQuantizedConfig`, read from a checkpoint."""


def to_ours(config: Any) -> EfficiencyConfig:
    """The config of ours that reads or makes what a stock config describes.

    Args:
        config: One of ours (returned as it is), or a stock config object.

    Raises:
        ValueError: If the stock config asks for something that we do not read.
    """
    if isinstance(config, EfficiencyConfig):
        return config
    given = config.to_dict()
    method = str(getattr(given["quant_method"], "value", given["quant_method"]))
    if method == "gptq":
        return GPTQConfig(**_stock_gptq(given))
    if method == "awq":
        ours = AWQConfig.from_dict({**given, "version": str(getattr(given["version"], "value", given["version"]))})
        if isinstance(ours, EfficiencyConfig):
            return ours
    if method == "bitsandbytes":
        ours = NF4Config.from_dict(given)
        if isinstance(ours, EfficiencyConfig):
            return ours
    raise ValueError(f"hf_efficiency does not read configs of quant_method={method!r}.")


def _stock_gptq(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of our GPTQ from a stock `GPTQConfig`, whose `dataset` is our `calibration`."""
    taken = {
        k: given[k] for k in ("bits", "group_size", "damp_percent", "desc_act", "sym", "true_sequential", "batch_size")
    }
    taken["format"] = str(given.get("checkpoint_format") or given.get("format") or "gptq")
    if given.get("modules_in_block_to_quantize") is not None:
        raise ValueError(
            "modules_in_block_to_quantize is not supported: name the layers that stay dense, "
            'hf_efficiency.GPTQConfig(dynamic={"-:.*mlp.*": {}}), for example.'
        )
    if given.get("model_seqlen") is not None:
        taken["seq_len"] = given["model_seqlen"]
    dataset = given.get("dataset")
    if isinstance(dataset, str):
        raise ValueError(
            f"dataset={dataset!r} would have to be downloaded by name; give a list of texts instead, or use "
            "hf_efficiency.GPTQConfig(calibration=...)."
        )
    if dataset is not None:
        taken["calibration"] = dataset
    if given.get("tokenizer") is not None:
        taken["tokenizer"] = given["tokenizer"]
    return taken
