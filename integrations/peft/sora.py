"""`SoRAConfig` for `get_peft_model`, and what its training needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import TrainerCallback

from hf_efficiency.adapters.sora import SoRA
from hf_efficiency.integrations.peft.base import (
    AdapterLinear,
    LinearAdapterConfig,
    check_dropout,
    check_positive,
)
from hf_efficiency.integrations.peft.pruning import prune, trained_adapters
from hf_efficiency.integrations.peft.types import EfficiencyPeftType
from hf_efficiency.integrations.peft.watch import WatchedTuner, seen

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from hf_efficiency.adapters.base import BaseLinear


@dataclass
class SoRAConfig(LinearAdapterConfig):
    """Low-rank adapters whose ranks are pruned by sparse gates (Ding et al. 2023).

    A layer of rank r has r (d_in + d_out + 1) trained numbers. Train with `SoRACallback`, which does the proximal step,
    and removes at the end what was pruned.

    Args:
        r: Largest rank of a layer.
        lora_alpha: The change is multiplied with lora_alpha / r.
        sparse_lambda: Strength of the gates' L1 norm: each step moves a gate by the learning rate times this towards
            zero. Gates start with absolute values around 1, and optimizers of Adam's kind move them by about the
            learning rate a step, so below 1 the loss can hold a gate open, and above 1 all close in the end: large
            values are for short trainings.
        sora_dropout: Probability of dropping an input of the change.
        rank_pattern: The rank of each layer after pruning; filled in by training.

    Raises:
        ValueError: r, lora_alpha or sparse_lambda is not above 0, or the dropout is outside [0, 1).
    """

    kind: ClassVar[EfficiencyPeftType] = EfficiencyPeftType.SORA
    rank_field: ClassVar[str] = "r"

    r: int = 16
    lora_alpha: float = 16
    sparse_lambda: float = 0.5
    sora_dropout: float = 0.0
    rank_pattern: dict[str, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, r=self.r, lora_alpha=self.lora_alpha, sparse_lambda=self.sparse_lambda)
        check_dropout(self, sora_dropout=self.sora_dropout)


class SoRALinear(AdapterLinear):
    """A linear layer with SoRA on it."""

    adapter_layer_names = ("sora_adapter",)


class SoRAModel(WatchedTuner):
    """Puts SoRA into a model."""

    prefix = "sora_"
    tuner_layer_cls = SoRALinear
    config_class = SoRAConfig
    watched = "gates"
    untouched = (
        "this SoRA model is trained and nobody makes its gates sparse: no rank is pruned. Add "
        "hf_efficiency.SoRACallback() to the Trainer's callbacks."
    )

    def make_adapter(self, config: SoRAConfig, base: BaseLinear, name: str, shared: None) -> SoRA:
        """The adapter of one layer."""
        r = (config.rank_pattern or {}).get(name, config.r)
        return SoRA(base, r, config.lora_alpha / config.r, config.sora_dropout)


class SoRACallback(TrainerCallback):
    """Makes the gates of SoRA sparse in any `Trainer`, and removes the pruned directions when training ends.

    After each optimizer step every gate moves towards zero by its learning rate times the config's `sparse_lambda`.
    Checkpoints on the way hold all directions, so that training resumes exactly; what is saved after the training
    holds the remaining ones only.

    Raises:
        ValueError: At the beginning of the training: the model has no SoRA adapter to train.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the gates."""
        model = kwargs["model"]
        name, self._adapters = trained_adapters(model, SoRA)
        if not self._adapters:
            raise ValueError("SoRACallback needs a model with a SoRAConfig adapter that is trained; this one has none.")
        self._config = model.peft_config[name]
        seen(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The proximal step."""
        optimizer = kwargs["optimizer"]
        if not getattr(optimizer, "step_was_skipped", False):
            proximal_step(optimizer, self._adapters, self._config.sparse_lambda)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the directions out whose gates are zero."""
        rows = {name: adapter.gates.detach() != 0 for name, adapter in self._adapters.items()}
        prune(self._config, self._adapters, rows, kwargs.get("optimizer"))


def proximal_step(optimizer: Optimizer, adapters: dict[str, SoRA], sparse_lambda: float) -> None:
    """Shrinks the gates by the learning rate of their parameter group times lambda; those not in a group stay."""
    rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    for adapter in adapters.values():
        if id(adapter.gates) in rates:
            adapter.proximal_step(rates[id(adapter.gates)] * sparse_lambda)
