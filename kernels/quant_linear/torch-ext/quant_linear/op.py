"""The operators: checked arguments, meta implementations, gradients.

Shape legend: n rows, d_in, d_out features, g groups along d_in.
"""

from typing import Any

import torch
from torch import Tensor

from ._launch import namespace, run

_NAMESPACE = namespace(__package__)
_FLOATING = (torch.float16, torch.bfloat16, torch.float32)
_BITS = (2, 3, 4, 8)


def gptq_linear(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    zero_offset: int = 1,
) -> Tensor:
    """x W + bias with the tensors of a GPTQ checkpoint (https://arxiv.org/abs/2210.17323): w = scale (code - zero).

    Has gradients with respect to x and the bias.

    Args:
        x: (..., d_in) float16, bfloat16 or float32.
        qweight: int32 (d_in * bits / 32, d_out): codes packed along d_in, low end first; 3-bit codes as one string of
            96 bits over three words.
        qzeros: int32 (g, d_out * bits / 32): zero points, packed along d_out in the same way.
        scales: (g, d_out) float16, bfloat16 or float32.
        g_idx: int32 (d_in,), the group of each column, each below g (not checked); None: column i has group
            i // group_size, which is faster. The last group may be smaller.
        bias: (d_out,) or None.
        bits: 2, 3, 4 or 8.
        group_size: Columns of a group; -1 for one group.
        zero_offset: What was subtracted from the zero points before they were stored: 1 in version 1 of the format, 0
            in version 2.

    Returns:
        (..., d_out), in the dtype of x.

    Raises:
        ValueError: Shapes, dtypes, devices, bits or group sizes that don't match.
    """
    if bits not in _BITS:
        raise ValueError(f"bits={bits} is not supported: choose one of {_BITS}.")
    if zero_offset not in (0, 1):
        raise ValueError(f"zero_offset={zero_offset} must be 1 (version 1 of the format) or 0 (version 2).")
    _check_words(x, qweight, scales)
    d_in, d_out = x.shape[-1], scales.shape[1]
    if qweight.shape != (d_in * bits // 32, d_out) or d_in * bits % 32:
        raise ValueError(
            f"qweight of shape {tuple(qweight.shape)} holds {qweight.shape[0] * 32 // bits} x {qweight.shape[1]} codes "
            f"of {bits} bits; x and scales say {d_in} x {d_out}."
        )
    _check_groups(qzeros, scales, d_in, group_size, d_out * bits // 32)
    if d_out * bits % 32:
        raise ValueError(f"d_out={d_out} does not fill whole 32-bit words of qzeros at bits={bits}.")
    if g_idx is not None and (g_idx.shape != (d_in,) or g_idx.dtype != torch.int32):
        raise ValueError(f"g_idx is {g_idx.dtype} of shape {tuple(g_idx.shape)}: it must be int32 of shape ({d_in},).")
    _check_rest(x, d_out, qweight=qweight, qzeros=qzeros, scales=scales, g_idx=g_idx, bias=bias)
    rows = x.reshape(-1, d_in)
    y: Tensor = _gptq_linear(rows, qweight, qzeros, scales, g_idx, bias, bits, group_size, zero_offset)
    return y.view(*x.shape[:-1], d_out)


def awq_linear(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int,
) -> Tensor:
    """x W + bias with the 4-bit tensors of an AWQ GEMM checkpoint (https://arxiv.org/abs/2306.00978).

    Nibble i of word j holds output 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[i]. Has gradients with respect to x and the bias.

    Args:
        x: (..., d_in) float16, bfloat16 or float32.
        qweight: int32 (d_in, d_out / 8).
        qzeros: int32 (g, d_out / 8), nibbles in the same order, zero points as they are.
        scales: (g, d_out) float16, bfloat16 or float32.
        bias: (d_out,) or None.
        group_size: Columns of a group; -1 for one group. The last group may be smaller.

    Returns:
        (..., d_out), in the dtype of x.

    Raises:
        ValueError: Shapes, dtypes, devices or group sizes that don't match.
    """
    _check_words(x, qweight, scales)
    d_in, d_out = x.shape[-1], scales.shape[1]
    if qweight.shape != (d_in, d_out // 8) or d_out % 8:
        raise ValueError(
            f"qweight of shape {tuple(qweight.shape)} holds {qweight.shape[0]} x {qweight.shape[1] * 8} codes of 4 "
            f"bits; x and scales say {d_in} x {d_out}."
        )
    _check_groups(qzeros, scales, d_in, group_size, d_out // 8)
    _check_rest(x, d_out, qweight=qweight, qzeros=qzeros, scales=scales, bias=bias)
    y: Tensor = _awq_linear(x.reshape(-1, d_in), qweight, qzeros, scales, bias, group_size)
    return y.view(*x.shape[:-1], d_out)


def _check_words(x: Tensor, qweight: Tensor, scales: Tensor) -> None:
    for name, t in (("x", x), ("scales", scales)):
        if t.dtype not in _FLOATING:
            raise ValueError(f"{name} is {t.dtype}: cast it to float16, bfloat16 or float32.")
    if qweight.dtype != torch.int32 or qweight.ndim != 2 or scales.ndim != 2 or x.ndim == 0:
        raise ValueError(
            f"qweight must be an int32 matrix and scales a matrix, got {qweight.dtype} of shape "
            f"{tuple(qweight.shape)} and shape {tuple(scales.shape)} for x of shape {tuple(x.shape)}."
        )


def _check_groups(qzeros: Tensor, scales: Tensor, d_in: int, group_size: int, words: int) -> None:
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size={group_size} must be -1 (one group) or at least 1.")
    groups = 1 if group_size == -1 else -(-d_in // group_size)
    if scales.shape[0] != groups:
        raise ValueError(
            f"scales has {scales.shape[0]} groups, d_in={d_in} in groups of group_size={group_size} makes {groups}."
        )
    if qzeros.shape != (groups, words) or qzeros.dtype != torch.int32:
        raise ValueError(
            f"qzeros is {qzeros.dtype} of shape {tuple(qzeros.shape)}: it must be int32 of shape ({groups}, {words})."
        )


def _check_rest(x: Tensor, d_out: int, **tensors: Tensor | None) -> None:
    bias = tensors["bias"]
    if bias is not None and (bias.shape != (d_out,) or bias.dtype not in _FLOATING):
        raise ValueError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)}: it must be float16, bfloat16 or float32 of shape "
            f"({d_out},)."
        )
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"x lies on {x.device} and {name} on {t.device}: move them to one device.")


@torch.library.custom_op(f"{_NAMESPACE}::gptq_linear", mutates_args=())
def _gptq_linear(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    zero_offset: int,
) -> Tensor:
    args = (x, qweight, qzeros, scales, g_idx, bias, bits, group_size, zero_offset)
    y: Tensor = run(__package__, "gptq_linear", *args)
    return y


@_gptq_linear.register_fake
def _(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[1])


@torch.library.custom_op(f"{_NAMESPACE}::gptq_linear_backward", mutates_args=())
def _gptq_linear_backward(
    grad: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    zero_offset: int,
) -> Tensor:
    args = (grad, qweight, qzeros, scales, g_idx, bits, group_size, zero_offset)
    y: Tensor = run(__package__, "gptq_linear_backward", *args)
    return y


@_gptq_linear_backward.register_fake
def _(grad: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Any, bits: int, *rest: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], qweight.shape[0] * 32 // bits)


def _keep_gptq(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])
    ctx.settings = inputs[6:]
    ctx.bias_dtype = None if inputs[5] is None else inputs[5].dtype


def _gptq_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = _gptq_linear_backward(grad, *ctx.saved_tensors, *ctx.settings) if ctx.needs_input_grad[0] else None
    grad_bias = grad.float().sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[5] else None
    return grad_x, None, None, None, None, grad_bias, None, None, None


_gptq_linear.register_autograd(_gptq_grads, setup_context=_keep_gptq)


@torch.library.custom_op(f"{_NAMESPACE}::awq_linear", mutates_args=())
def _awq_linear(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    y: Tensor = run(__package__, "awq_linear", x, qweight, qzeros, scales, bias, group_size)
    return y


@_awq_linear.register_fake
def _(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[1])


@torch.library.custom_op(f"{_NAMESPACE}::awq_linear_backward", mutates_args=())
def _awq_linear_backward(grad: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    y: Tensor = run(__package__, "awq_linear_backward", grad, qweight, qzeros, scales, group_size)
    return y


@_awq_linear_backward.register_fake
def _(grad: Tensor, qweight: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], qweight.shape[0])


def _keep_awq(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])
    ctx.group_size = inputs[5]
    ctx.bias_dtype = None if inputs[4] is None else inputs[4].dtype


def _awq_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = _awq_linear_backward(grad, *ctx.saved_tensors, ctx.group_size) if ctx.needs_input_grad[0] else None
    grad_bias = grad.float().sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, grad_bias, None


_awq_linear.register_autograd(_awq_grads, setup_context=_keep_awq)
