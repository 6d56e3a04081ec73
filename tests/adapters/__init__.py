"""Every PEFT type with small arguments. `integrations/peft/test_composition.py` crosses this table with the quantized
bases; a new type is a row."""

from dataclasses import dataclass, field
from typing import Any

from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, VeraConfig

from hf_efficiency import (
    AdaDoRAConfig,
    BitFitConfig,
    BottleneckConfig,
    CompacterConfig,
    DVoRAConfig,
    DyLoRAConfig,
    IntrinsicConfig,
    SNELLConfig,
    SoRAConfig,
)

# Layers of the tiny Llama, for types that need more than one list; the others say `all-linear`.
_FEEDFORWARD = ["down_proj"]
_LINEAR = ["q_proj", "v_proj", "o_proj", *_FEEDFORWARD]


@dataclass(frozen=True)
class Adapter:
    """One row.

    Attributes:
        config: The config class.
        arguments: Of the config.
        learning_rate: With which the loss falls within three steps of AdamW.
        merges: Whether the type can be merged into the weights. Where not, `merge_adapters` must say so.
        checkpointing: Whether the type trains under gradient checkpointing.
    """

    config: type[PeftConfig]
    arguments: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 2e-2
    merges: bool = True
    checkpointing: bool = True

    def build(self, **overrides: Any) -> PeftConfig:
        """A new config."""
        return self.config(**{"task_type": "CAUSAL_LM", **self.arguments, **overrides})


def _lora(**arguments: Any) -> Adapter:
    return Adapter(LoraConfig, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **arguments})


ADAPTERS = {
    "lora": _lora(),
    "rslora": _lora(use_rslora=True),
    "dora": _lora(use_dora=True),
    "adalora": Adapter(
        AdaLoraConfig,
        {"init_r": 6, "target_r": 4, "total_step": 10, "tinit": 1, "tfinal": 2, "target_modules": "all-linear"},
    ),
    "vera": Adapter(VeraConfig, {"r": 8, "target_modules": _LINEAR}, learning_rate=0.1),
    "ia3": Adapter(IA3Config, {"target_modules": _LINEAR, "feedforward_modules": _FEEDFORWARD}, learning_rate=0.1),
    "prefix": Adapter(
        PrefixTuningConfig, {"num_virtual_tokens": 4}, learning_rate=0.1, merges=False, checkpointing=False
    ),
    "prompt": Adapter(PromptTuningConfig, {"num_virtual_tokens": 4}, learning_rate=0.1, merges=False),
    "bottleneck": Adapter(BottleneckConfig, {"bottleneck_size": 8}, merges=False),
    "parallel": Adapter(BottleneckConfig, {"variant": "parallel", "bottleneck_size": 8}, merges=False),
    "compacter": Adapter(CompacterConfig, {"bottleneck_size": 8, "kronecker_n": 3}, merges=False),
    "snell": Adapter(SNELLConfig, {"r": 4}, learning_rate=5e-2),
    "bitfit": Adapter(BitFitConfig, {"add_bias": True}, merges=False),
    "intrinsic": Adapter(IntrinsicConfig, {"d": 100}, learning_rate=0.1),
    "said": Adapter(IntrinsicConfig, {"d": 100, "said": True}, learning_rate=0.1),
    "dvora": Adapter(DVoRAConfig, {"r": 8}, learning_rate=0.1),
    "sora": Adapter(SoRAConfig, {"r": 4}),
    "dylora": Adapter(DyLoRAConfig, {"r": 4, "min_rank": 2}),
    "adadora": Adapter(AdaDoRAConfig, {"init_r": 6, "target_r": 4}, learning_rate=5e-2),
}
