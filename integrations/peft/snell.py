"""`SNELLConfig` for `get_peft_model`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hf_efficiency.adapters.snell import SNELL
from hf_efficiency.integrations.peft.base import (
    AdapterLinear,
    LinearAdapterConfig,
    LinearAdapterTuner,
    check_positive,
)
from hf_efficiency.integrations.peft.types import EfficiencyPeftType

if TYPE_CHECKING:
    from hf_efficiency.adapters.base import BaseLinear


@dataclass
class SNELLConfig(LinearAdapterConfig):
    """Sparse tuning with kernelized LoRA (Shen et al. 2024): r (d_in + d_out) trained numbers a layer.

    Args:
        r: Rank, even: its halves are the two parts of the kernel.
        sparsity: Share of each layer's weights that do not change, in [0, 1). Which ones, each step decides anew.
        scale: Factor of the kernel.
        norm: Of the kernel's distances: 1 (piecewise linear) or 2.

    Raises:
        ValueError: A value is outside its bounds.
    """

    kind: ClassVar[EfficiencyPeftType] = EfficiencyPeftType.SNELL
    rank_field: ClassVar[str] = "r"

    r: int = 16
    sparsity: float = 0.9
    scale: float = 0.1
    norm: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, r=self.r, scale=self.scale)
        if self.r % 2:
            raise ValueError(f"SNELLConfig: r={self.r} must be even, for its halves are the two parts of the kernel.")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"SNELLConfig: sparsity={self.sparsity} must be in [0, 1).")
        if self.norm not in (1, 2):
            raise ValueError(f"SNELLConfig: norm={self.norm} must be 1 or 2.")


class SNELLLinear(AdapterLinear):
    """A linear layer with SNELL on it."""

    adapter_layer_names = ("snell_adapter",)


class SNELLModel(LinearAdapterTuner):
    """Puts SNELL into a model."""

    prefix = "snell_"
    tuner_layer_cls = SNELLLinear
    config_class = SNELLConfig

    def make_adapter(self, config: SNELLConfig, base: BaseLinear, name: str, shared: None) -> SNELL:
        """The adapter of one layer."""
        return SNELL(base, config.r, config.sparsity, config.scale, config.norm)
