"""The operators: checked arguments, and the arithmetic that the host does once a step.

Shape legend: weight and gradient (m, n), rank r. On the left the projection P is (m, r) and R = Pᵀ G (r, n); on the
right P is (n, r) and R = G P (m, r). The states have the shape of R.
"""

from typing import Literal

import torch
from torch import Tensor

from . import reference
from ._launch import namespace, run

_NAMESPACE = namespace(__package__)


def galore_update_(
    weight: Tensor,
    grad: Tensor,
    projection: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float | Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    scale: float = 0.25,
    side: Literal["left", "right"] = "left",
) -> None:
    """GaLore's update (Zhao et al. 2024, Algorithm 2) with decoupled weight decay. Changes weight and states in place.

    M = β1 M + (1-β1) R, V = β2 V + (1-β2) R², N = (M / (1-β1^t)) / (sqrt(V / (1-β2^t)) + ε), and then
    W = W (1 - lr λ) - lr α P N, or N Pᵀ on the right. Sums in float32; N is rounded to the dtype of the weight.

    Args:
        weight: (m, n) float32, bfloat16 or float16, of any strides. A leaf that requires gradients may be given: the
            update is not recorded.
        grad: (m, n), in the dtype of the weight.
        projection: Orthonormal columns, (m, r) on the left or (n, r) on the right, in the dtype of the weight.
        exp_avg: float32, contiguous, (r, n) on the left or (m, r) on the right.
        exp_avg_sq: Like `exp_avg`.
        step: t, from 1 on.
        lr: Learning rate: a number, or a tensor of one element on the CPU. `torch.compile` compiles again for a new
            number, but not for a new tensor or step.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: λ.
        scale: α, GaLore's scale of the projected update.
        side: On which side of the gradient the projection stands.

    Raises:
        ValueError: Shapes, devices, dtypes or numbers that don't match.
    """
    right = _check_matrices(weight, grad, projection, side)
    shape = _low_rank_shape(weight, projection, right)
    for name, state in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_state(name, state, shape, torch.float32, weight)
    _check_numbers(step, beta1, beta2, eps)
    _galore_update_(
        weight.detach(), grad.detach(), projection.detach(), exp_avg, exp_avg_sq, step, _as_tensor(lr), float(beta1),
        float(beta2), float(eps), float(weight_decay), float(scale), right,
    )  # fmt: skip


def galore_update_8bit_(
    weight: Tensor,
    grad: Tensor,
    projection: Tensor,
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    *,
    step: int,
    lr: float | Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    scale: float = 0.25,
    side: Literal["left", "right"] = "left",
) -> None:
    """`galore_update_` with 8-bit states (Dettmers et al. 2022): codes, and a scale for each 256 of them.

    The codes count through the dynamic map, signed for `exp_avg` and unsigned for `exp_avg_sq`, as `quantize_state`
    makes them. Codes and scales of zeros, as `torch.zeros` gives them, stand for a state of zeros. N is taken from the
    new states before they are rounded.

    Args:
        weight: As in `galore_update_`.
        grad: As in `galore_update_`.
        projection: As in `galore_update_`.
        exp_avg: uint8, contiguous, (r, n) on the left or (m, r) on the right.
        exp_avg_absmax: float32, (ceil(elements / 256),): the largest magnitude of 256 elements in row-major order.
        exp_avg_sq: Like `exp_avg`.
        exp_avg_sq_absmax: Like `exp_avg_absmax`.
        step: t, from 1 on.
        lr: Learning rate: a number, or a tensor of one element on the CPU. `torch.compile` compiles again for a new
            number, but not for a new tensor or step.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: λ.
        scale: α, GaLore's scale of the projected update.
        side: On which side of the gradient the projection stands.

    Raises:
        ValueError: Shapes, devices, dtypes or numbers that don't match.
    """
    right = _check_matrices(weight, grad, projection, side)
    shape = _low_rank_shape(weight, projection, right)
    blocks = (-(-(shape[0] * shape[1]) // reference.BLOCK),)
    for name, codes, absmax in (
        ("exp_avg", exp_avg, exp_avg_absmax),
        ("exp_avg_sq", exp_avg_sq, exp_avg_sq_absmax),
    ):
        _check_state(name, codes, shape, torch.uint8, weight)
        _check_state(f"{name}_absmax", absmax, blocks, torch.float32, weight)
    _check_numbers(step, beta1, beta2, eps)
    _galore_update_8bit_(
        weight.detach(), grad.detach(), projection.detach(), exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax,
        step, _as_tensor(lr), float(beta1), float(beta2), float(eps), float(weight_decay), float(scale), right,
    )  # fmt: skip


def quantize_state(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """A state of Adam as 8-bit codes of the dynamic map, block by block of 256 (Dettmers et al. 2022, section 2.1).

    Plain torch: for making or converting states, not for every step.

    Args:
        x: float32, of any shape.
        signed: True for `exp_avg`; False for `exp_avg_sq`, which has no sign.

    Returns:
        uint8 codes of the shape of x, and the float32 scales (ceil(elements / 256),).
    """
    return reference.quantize(x, signed)


def dequantize_state(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The float32 state that `quantize_state` rounded.

    Args:
        codes: uint8, of any shape.
        absmax: float32, (ceil(elements / 256),).
        signed: As it was quantized.

    Returns:
        float32 of the shape of `codes`.

    Raises:
        ValueError: Codes of another dtype, or another number of scales.
    """
    blocks = (-(-codes.numel() // reference.BLOCK),)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes are {codes.dtype}: torch.uint8 is wanted.")
    if absmax.shape != blocks:
        raise ValueError(f"absmax has shape {tuple(absmax.shape)}; codes {tuple(codes.shape)} need {blocks}.")
    return reference.dequantize(codes, absmax, signed)


def _check_matrices(weight: Tensor, grad: Tensor, projection: Tensor, side: str) -> bool:
    """ValueError unless weight, gradient and projection fit each other. Returns whether the projection is right."""
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"weight is {weight.dtype}: cast it to float16, bfloat16 or float32.")
    if weight.ndim != 2 or grad.shape != weight.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and grad {tuple(grad.shape)}: both must be one matrix (m, n)."
        )
    if side not in ("left", "right"):
        raise ValueError(f"side is {side!r}: it must be 'left' or 'right'.")
    rows = weight.shape[0] if side == "left" else weight.shape[1]
    if projection.ndim != 2 or projection.shape[0] != rows:
        raise ValueError(
            f"projection has shape {tuple(projection.shape)}; on the {side} of a weight {tuple(weight.shape)} it must "
            f"be ({rows}, r)."
        )
    for name, x in (("grad", grad), ("projection", projection)):
        if x.dtype != weight.dtype:
            raise ValueError(f"{name} is {x.dtype} and weight {weight.dtype}: cast it to the dtype of the weight.")
        _check_device(name, x, weight)
    return side == "right"


def _low_rank_shape(weight: Tensor, projection: Tensor, right: bool) -> tuple[int, int]:
    rank = projection.shape[1]
    return (weight.shape[0], rank) if right else (rank, weight.shape[1])


def _check_state(name: str, state: Tensor, shape: tuple[int, ...], dtype: torch.dtype, weight: Tensor) -> None:
    """ValueError unless a state can be updated in place."""
    if state.shape != shape or state.dtype != dtype:
        raise ValueError(f"{name} is {state.dtype} of shape {tuple(state.shape)}; {dtype} of {shape} is wanted.")
    if not state.is_contiguous():
        raise ValueError(f"{name} has strides {state.stride()}: it must be contiguous, as it changes in place.")
    _check_device(name, state, weight)


def _check_device(name: str, x: Tensor, weight: Tensor) -> None:
    if x.device != weight.device:
        raise ValueError(f"{name} lies on {x.device} and weight on {weight.device}: move them to one device.")


def _check_numbers(step: int, beta1: float, beta2: float, eps: float) -> None:
    if step < 1:
        raise ValueError(f"step is {step}: the first one is 1.")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"beta1 is {beta1} and beta2 {beta2}: both must lie in [0, 1).")
    if eps < 0:
        raise ValueError(f"eps is {eps}: it can't be negative.")


def _as_tensor(lr: float | Tensor) -> Tensor:
    """The learning rate as the operators take it. ValueError where reading it would wait for a device."""
    if not isinstance(lr, Tensor):
        return torch.tensor(lr, dtype=torch.float64)
    if lr.numel() != 1 or lr.device.type != "cpu":
        raise ValueError(
            f"lr has shape {tuple(lr.shape)} on {lr.device}: a number or one element on the CPU is wanted."
        )
    return lr


def _update_(
    function: str,
    weight: Tensor,
    grad: Tensor,
    projection: Tensor,
    states: tuple[Tensor, ...],
    step: int,
    lr: Tensor,
    numbers: tuple[float, float, float],
    weight_decay: float,
    scale: float,
    right: bool,
) -> None:
    """Adam's step, by `function`, and the weight's; `numbers`: both betas and epsilon.

    They are two calls of `run`: each writes in place in its last launch only, so that the reference can take over from
    a kernel that does not compile without doing anything twice.
    """
    rate = lr.item()  # on the CPU: waits for nothing
    corrections = 1 - numbers[0] ** step, 1 - numbers[1] ** step
    n = run(__package__, function, grad, projection, *states, *numbers, *corrections, right)
    run(__package__, "apply_step_", weight, projection, n, 1 - rate * weight_decay, rate * scale, right)


@torch.library.custom_op(f"{_NAMESPACE}::galore_update_", mutates_args=("weight", "exp_avg", "exp_avg_sq"))
def _galore_update_(
    weight: Tensor,
    grad: Tensor,
    projection: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    right: bool,
) -> None:
    states, numbers = (exp_avg, exp_avg_sq), (beta1, beta2, eps)
    _update_("low_rank_step", weight, grad, projection, states, step, lr, numbers, weight_decay, scale, right)


@_galore_update_.register_fake
def _(*args: object) -> None:
    return None


@torch.library.custom_op(
    f"{_NAMESPACE}::galore_update_8bit_",
    mutates_args=("weight", "exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax"),
)
def _galore_update_8bit_(
    weight: Tensor,
    grad: Tensor,
    projection: Tensor,
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    step: int,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    right: bool,
) -> None:
    states, numbers = (exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax), (beta1, beta2, eps)
    _update_("low_rank_step_8bit", weight, grad, projection, states, step, lr, numbers, weight_decay, scale, right)


@_galore_update_8bit_.register_fake
def _(*args: object) -> None:
    return None
