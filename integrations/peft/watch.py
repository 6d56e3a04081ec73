"""Says so when an adapter that needs something done after each optimizer step is trained without it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from hf_efficiency.integrations.peft.base import LinearAdapterTuner
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class TrainingWatch:
    """A forward hook of one layer: warns at the first training step after an optimizer changed `parameter` unseen.

    A step is noticed by the values, in any training loop; fused optimizers do not raise a tensor's version counter.

    Args:
        parameter: One that every optimizer step changes.
        message: The warning.
        handled: Whether somebody has done what the adapter needs; beside `seen`, which callbacks set.
    """

    def __init__(self, parameter: nn.Parameter, message: str, handled: Callable[[], bool] | None = None) -> None:
        self.parameter, self.message, self.handled = parameter, message, handled
        self.seen = False
        self._before: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Called before the layer's forward pass."""
        if self.seen or not (module.training and torch.is_grad_enabled() and self.parameter.requires_grad):
            return
        if self._before is None:
            self._before = self.parameter.detach().clone()
        elif not torch.equal(self._before, self.parameter):
            self._before = None
            self.seen = True
            if self.handled is None or not self.handled():
                warnings.warn(self.message, UserWarning, stacklevel=2)


def watch(layer: nn.Module, hook: TrainingWatch) -> None:
    """Puts the hook on a layer."""
    layer.register_forward_pre_hook(hook)


class WatchedTuner(LinearAdapterTuner):
    """Puts an adapter into a model that needs a callback, and a watch on its training."""

    # The adapter's parameter that every optimizer step changes, and what to say of steps that nobody follows up.
    watched: ClassVar[str]
    untouched: ClassVar[str]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts an adapter into the model, and a watch on its training."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layer = next(m for m in model.modules() if isinstance(m, self.tuner_layer_cls) and adapter_name in m.adapters)
        watch(layer, TrainingWatch(getattr(layer.adapters[adapter_name], self.watched), self.untouched))


def seen(model: nn.Module) -> None:
    """Tells the watches in `model` that what they watch for is being done."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, TrainingWatch):
                hook.seen = True


class _PeftAllocates:
    """Whether a training loop calls `update_and_allocate`, as PEFT's documentation asks."""

    def __init__(self, tuner: AdaLoraModel) -> None:
        self.tuner = tuner

    def __call__(self) -> bool:
        return bool(self.tuner.rankallocator.ipt)


def _watch_adalora(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """A torch hook for modules that become part of another: PEFT's AdaLoRA is watched when PeftModel takes it in."""
    if not isinstance(module, AdaLoraModel) or not hasattr(module, "trainable_adapter_name"):
        return
    adapter = module.trainable_adapter_name
    layers: list[Any] = [m for m in module.model.modules() if isinstance(m, AdaLoraLayer) and adapter in m.lora_E]
    if layers and not any(isinstance(hook, TrainingWatch) for hook in layers[0]._forward_pre_hooks.values()):
        message = (
            "this AdaLoRA model is trained and nobody allocates its budget: no rank is reduced. Add "
            "hf_efficiency.AdaLoRACallback() to the Trainer's callbacks, or call update_and_allocate(step) between "
            "optimizer.step() and zero_grad()."
        )
        watch(layers[0], TrainingWatch(layers[0].lora_E[adapter], message, _PeftAllocates(module)))


_registered: list[Any] = []


def watch_new_adalora_models() -> None:
    """From now on PEFT's AdaLoRA models are watched, through torch's own hook. Doing this twice changes nothing."""
    if not _registered:
        _registered.append(register_module_module_registration_hook(_watch_adalora))
