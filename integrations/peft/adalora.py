"""`AdaLoRACallback`: AdaLoRA's budget, really allocated, in any `Trainer`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_efficiency.adapters.adadora import AdaDoRA
from hf_efficiency.adapters.rank_allocation import (
    IMPORTANCES,
    BudgetSchedule,
    Importance,
    RankAllocator,
    add_orthogonality_gradient,
)
from hf_efficiency.adapters.triplet import Directions
from hf_efficiency.integrations.peft.pruning import prune, trained_adapters
from hf_efficiency.integrations.peft.watch import seen
from peft.tuners.adalora.layer import AdaLoraLayer

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

_STATE_FILE = "adalora_allocator.safetensors"


class AdaLoRACallback(TrainerCallback):
    """Allocates the ranks of PEFT's `AdaLoraConfig`, or of our `AdaDoRAConfig`, while any `Trainer` trains.

    The number of steps comes from the Trainer, and replaces the config's `total_step`; steps are those of the
    optimizer, so gradient accumulation changes nothing. At the end exactly target_r times the number of matrices
    directions are left, also when training stops early, and what is saved afterwards holds only those. Checkpoints on
    the way hold all directions and the averages behind the allocation, so that training resumes exactly.

    The orthogonality term enters as its gradient, whatever the loss and the task type. For that the callback takes
    `orth_reg_weight` of an `AdaLoraConfig` over and sets it to 0: PEFT would add the term to the evaluation loss too.

    Args:
        importance: How directions are ranked: `"sensitivity"` (the paper's), `"gradient_norm"` or `"magnitude"`, see
            `RankAllocator`; by default what an `AdaDoRAConfig` says, else the paper's.
        orth_reg_weight: In place of the config's.

    Raises:
        ValueError: The importance is unknown; at the beginning of the training: the model has no such adapter to
            train, or too few steps for the config's tinit and tfinal.
    """

    def __init__(self, importance: Importance | None = None, orth_reg_weight: float | None = None) -> None:
        if importance is not None and importance not in IMPORTANCES:
            raise ValueError(f"importance={importance!r} must be one of {', '.join(IMPORTANCES)}.")
        self.importance, self.orth_reg_weight = importance, orth_reg_weight

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the matrices and makes the schedule."""
        model = kwargs["model"]
        self._name, self._matrices, self._adapters = _trained_matrices(model)
        self._config = config = model.peft_config[self._name]
        first = sum(directions.e.numel() for directions in self._matrices.values())
        last = config.target_r * len(self._matrices)
        schedule = BudgetSchedule(state.max_steps, config.tinit, config.tfinal, config.deltaT, first, last)
        importance: Any = self.importance or getattr(config, "importance", "sensitivity")
        self._allocator = RankAllocator(self._matrices, schedule, importance, config.beta1, config.beta2)
        if self.orth_reg_weight is None:
            self.orth_reg_weight = config.orth_reg_weight
        if not self._adapters:
            config.orth_reg_weight, config.total_step = 0.0, state.max_steps
        if state.global_step > 0:
            self._resume(_checkpoint(args, state) / _STATE_FILE)
        seen(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the gradient of the orthogonality term."""
        if self.orth_reg_weight:
            add_orthogonality_gradient(self._matrices.values(), self.orth_reg_weight)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Allocates the budget of this step."""
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self._allocator.step(state.global_step + 1)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts what the allocation depends on beside the checkpoint's other files."""
        folder = _checkpoint(args, state)
        if args.should_save and folder.is_dir():
            save_file(self._allocator.state_dict(), folder / _STATE_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the target, and makes what is saved from now on as small as that."""
        self._allocator.finish()
        rows = self._allocator.kept
        if self._adapters:
            prune(self._config, self._adapters, rows, kwargs.get("optimizer"))
        else:
            self._config.rank_pattern = {f"{name}.lora_E.{self._name}": kept.tolist() for name, kept in rows.items()}

    def _resume(self, path: Path) -> None:
        if path.is_file():
            self._allocator.load_state_dict(load_file(path))
        else:
            logger.warning("%s is missing: the importance of the ranks is measured anew from here on.", path)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _trained_matrices(model: nn.Module) -> tuple[str, dict[str, Directions], dict[str, AdaDoRA]]:
    """The adapter that is trained, its matrices by their layer's name, and, of AdaDoRA, the layers' adapters."""
    name, adapters = trained_adapters(model, AdaDoRA)
    if adapters:
        return name, {layer: adapter.directions for layer, adapter in adapters.items()}, adapters
    matrices: dict[str, Directions] = {}
    for layer, module in model.named_modules():
        if isinstance(module, AdaLoraLayer):
            vectors: Any = module
            for adapter_name, e in vectors.lora_E.items():
                if e.requires_grad:
                    name = adapter_name
                    directions = Directions(e, vectors.lora_A[name], vectors.lora_B[name])
                    matrices[layer.removeprefix("base_model.model.")] = directions
    if not matrices:
        kinds = sorted({type(config).__name__ for config in getattr(model, "peft_config", {}).values()})
        raise ValueError(
            "AdaLoRACallback needs a model with an AdaLoraConfig or AdaDoRAConfig adapter that is trained; this one "
            f"has {', '.join(kinds) or 'no adapter'}."
        )
    return name, matrices, {}
