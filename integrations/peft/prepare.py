"""Readies a model, quantized or dense, for training adapters on it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft import PeftModel

# Handles of the hooks that keep a norm in float32, and the dtype that its parameters had.
_MARK = "_hf_efficiency_norm"


def prepare_for_training(
    model: nn.Module,
    gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Freezes a model, computes its norms in float32, and turns on gradient checkpointing and input gradients.

    Call it before `get_peft_model`. It does for our quantized bases, and for dense ones, what PEFT's
    `prepare_model_for_kbit_training` does for those that it knows. Activations keep the model's dtype: each norm takes
    them to float32 and gives them back, so that no other layer meets a dtype it does not expect.

    Args:
        model: From `from_pretrained`; changed in place.
        gradient_checkpointing: Recompute each block's activations in the backward pass. Prefix tuning can't.
        gradient_checkpointing_kwargs: For `torch.utils.checkpoint`; by default `{"use_reentrant": False}`.

    Returns:
        The model.

    Raises:
        TypeError: If it is no `PreTrainedModel`.
        ValueError: If it has adapters already, which would be frozen with the rest, or can't checkpoint.
    """
    if isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("the model has adapters, which would be frozen: call prepare_for_training before adding them.")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"prepare_for_training takes a transformers model, not {type(model).__name__}.")
    if gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ValueError(f"{type(model).__name__} has no gradient checkpointing: pass gradient_checkpointing=False.")
    model.requires_grad_(False)
    for module in model.modules():
        if _is_norm(module):
            _keep_in_float32(module)
    if gradient_checkpointing:
        kwargs = {"use_reentrant": False} if gradient_checkpointing_kwargs is None else gradient_checkpointing_kwargs
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    model.enable_input_require_grads()
    return model


def undo_preparation(model: nn.Module) -> None:
    """Gives the norms their dtype back and removes the hooks. Does nothing to a model that was not prepared."""
    for module in model.modules():
        mark = module.__dict__.pop(_MARK, None)
        if mark is not None:
            dtype, handles = mark
            for handle in handles:
                handle.remove()
            module.to(dtype)


def _is_norm(module: nn.Module) -> bool:
    """A layer whose parameters are one vector of scales, and perhaps one of shifts: LayerNorm, RMSNorm and the like."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    return (
        "weight" in own
        and set(own) <= {"weight", "bias"}
        and not any(True for _ in module.children())
        and all(p.ndim == 1 for p in own.values())
        and "norm" in type(module).__name__.lower()
    )


def _keep_in_float32(module: nn.Module) -> None:
    dtype = module._parameters["weight"].dtype  # type: ignore[union-attr]  # a norm has one
    if dtype == torch.float32 or _MARK in module.__dict__:
        return
    module.to(torch.float32)
    handles = (module.register_forward_pre_hook(_to_float32), module.register_forward_hook(_back))
    module.__dict__[_MARK] = (dtype, handles)


def _to_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].float(), *args[1:])


def _back(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(module.__dict__[_MARK][0])
