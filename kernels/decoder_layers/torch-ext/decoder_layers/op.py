"""The operators: checked arguments, meta implementations, gradients.

Shape legend: n rows, d features.
"""

import torch
from torch import Tensor

from ._launch import namespace, run

_NAMESPACE = namespace(__package__)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square norm (Zhang and Sennrich 2019), as Llama computes it.

    Args:
        x: (..., d) float16, bfloat16 or float32.
        weight: (d,), on the device of x.
        eps: Added to the mean square.

    Returns:
        (..., d), in the dtype that `weight * x` has.

    Raises:
        ValueError: Shapes, devices or dtypes that don't match.
    """
    check_floating("x", x)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, the last dimension of x {tuple(x.shape[-1:])}.")
    check_together("x", x, "weight", weight)
    y: Tensor = _rms_norm(x.reshape(-1, x.shape[-1]), weight, eps)
    return y.view(x.shape)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the activation of a gated MLP (SwiGLU, Shazeer 2020).

    Args:
        gate: (..., d) float16, bfloat16 or float32.
        up: (..., d), of the same shape, dtype and device.

    Returns:
        (..., d), in the dtype of `gate`.

    Raises:
        ValueError: Shapes, devices or dtypes that don't match.
    """
    check_floating("gate", gate)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate is {gate.dtype} of shape {tuple(gate.shape)}, up {up.dtype} of shape {tuple(up.shape)}: they must "
            "be alike."
        )
    check_together("gate", gate, "up", up)
    d = gate.shape[-1]
    y: Tensor = _silu_mul(gate.reshape(-1, d), up.reshape(-1, d))
    return y.view(gate.shape)


def check_floating(name: str, x: Tensor) -> None:
    """ValueError unless a kernel takes the dtype of x."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"{name} is {x.dtype}: cast it to float16, bfloat16 or float32.")


def check_together(first: str, x: Tensor, second: str, y: Tensor) -> None:
    """ValueError unless two tensors lie on one device."""
    if x.device != y.device:
        raise ValueError(f"{first} lies on {x.device} and {second} on {y.device}: move them to one device.")


@torch.library.custom_op(f"{_NAMESPACE}::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y: Tensor = run(__package__, "rms_norm", x, weight, eps)
    return y


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))


@torch.library.custom_op(f"{_NAMESPACE}::rms_norm_backward", mutates_args=())
def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = run(__package__, "rms_norm_backward", grad, x, weight, eps)
    return grads


@_rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep_norm(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.eps = inputs[2]  # type: ignore[attr-defined]


def _norm_grads(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None  # type: ignore[attr-defined]


_rms_norm.register_autograd(_norm_grads, setup_context=_keep_norm)


@torch.library.custom_op(f"{_NAMESPACE}::silu_mul", mutates_args=())
def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    y: Tensor = run(__package__, "silu_mul", gate, up)
    return y


@_silu_mul.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op(f"{_NAMESPACE}::silu_mul_backward", mutates_args=())
def _silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = run(__package__, "silu_mul_backward", grad, gate, up)
    return grads


@_silu_mul_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _keep_gate(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gate_grads(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = _silu_mul_backward(grad, *ctx.saved_tensors)  # type: ignore[attr-defined]
    return grads


_silu_mul.register_autograd(_gate_grads, setup_context=_keep_gate)
