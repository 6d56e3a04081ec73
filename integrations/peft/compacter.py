"""`CompacterConfig` for `get_peft_model`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hf_efficiency.adapters.compacter import Compacter, slow_weights
from hf_efficiency.integrations.peft.base import AdapterLinear, check_positive
from hf_efficiency.integrations.peft.sublayers import SublayerConfig, SublayerTuner
from hf_efficiency.integrations.peft.types import EfficiencyPeftType

if TYPE_CHECKING:
    from hf_efficiency.adapters.base import BaseLinear
    from hf_efficiency.adapters.shared import SharedParameter


@dataclass
class CompacterConfig(SublayerConfig):
    """Bottleneck adapters out of Kronecker sums (Karimi Mahabadi et al. 2021). They cannot be merged.

    Trains n^3 numbers for the whole model and, where n divides both widths, 2 r (d + m) and d + m biases an adapter.

    Args:
        variant: `"houlsby"` (Compacter) or `"pfeiffer"` (Compacter++).
        kronecker_n: Number n of terms of the Kronecker sums. Where it does not divide a width, zeros fill that up.
        r: Rank of the fast weights.
        reduction_factor, bottleneck_size, non_linearity, adapter_dropout, target_modules: As in `SublayerConfig`.

    Raises:
        ValueError: A value is outside its bounds.
    """

    kind: ClassVar[EfficiencyPeftType] = EfficiencyPeftType.COMPACTER

    non_linearity: str = "gelu"
    kronecker_n: int = 4
    r: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, kronecker_n=self.kronecker_n, r=self.r)

    def check_layer(self, name: str, base: BaseLinear) -> None:
        """Refuses a bottleneck that does not fit, a Kronecker factor above it, and a rank above the fast weights'."""
        super().check_layer(name, base)
        n, m = self.kronecker_n, self.bottleneck(base.out_features)
        if n > m:
            raise ValueError(
                f"kronecker_n={n} is above {m}, the width of the bottleneck of {name}: choose at most {m}."
            )
        bound = -(-m // n)
        if self.r > bound:
            raise ValueError(
                f"r={self.r} is above {bound}, the rank of the fast weights of {name} (bottleneck {m} over kronecker_n "
                f"{n}): choose a smaller r or a wider bottleneck."
            )


class CompacterLinear(AdapterLinear):
    """A linear layer with a Compacter after it."""

    adapter_layer_names = ("compacter_adapter",)


class CompacterModel(SublayerTuner):
    """Puts Compacter into a model."""

    prefix = "compacter_"
    tuner_layer_cls = CompacterLinear
    config_class = CompacterConfig

    def make_shared(self, config: CompacterConfig, layers: dict[str, BaseLinear]) -> SharedParameter:
        """The slow weights."""
        return slow_weights(config.kronecker_n)

    def make_adapter(self, config: CompacterConfig, base: BaseLinear, name: str, shared: SharedParameter) -> Compacter:
        """The adapter of one layer."""
        d = base.out_features
        m, n, r = config.bottleneck(d), config.kronecker_n, config.r
        return Compacter(d, m, n, r, shared, config.non_linearity, config.adapter_dropout)
