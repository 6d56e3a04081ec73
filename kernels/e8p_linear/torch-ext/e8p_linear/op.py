"""The operators: checked arguments, meta implementations, gradients.

Shape legend: d_in inputs, d_out outputs, c = d_in / 8 codes a row.
"""

from typing import Any

import torch
from torch import Tensor

from ._launch import namespace, run

_NAMESPACE = namespace(__package__)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def e8p_linear(
    x: Tensor,
    codes: Tensor,
    residual: Tensor | None = None,
    *,
    patterns: Tensor,
    roots: Tensor | None = None,
    residual_scale: float = 1.0,
) -> Tensor:
    """x Cᵀ, where C holds the codewords of QuIP# (Tseng et al. 2024) of 2, 3 or 4 bits. Differentiable in x.

    Args:
        x: (..., d_in) float16, bfloat16 or float32.
        codes: (d_out, c) int16, the E8P code of 8 weights each.
        residual: The second stage, (d_out, c): int16, E8P again (4 bits), or uint8, of the 1-bit E8 codebook (3 bits).
        patterns: (256,) int32, see `e8p_tables`.
        roots: (256,) int32, for a uint8 residual only.
        residual_scale: C = stage 1 + stage 2 / residual_scale.

    Returns:
        (..., d_out) in the dtype of x, summed in float32. From 257 rows on the weight is decoded into memory (at most
        32 MiB of a half precision at a time) and multiplied by the vendor's library.

    Raises:
        ValueError: Shapes, dtypes or devices that don't match.
    """
    if x.dtype not in _DTYPES:
        raise ValueError(f"x is {x.dtype}: cast it to float16, bfloat16 or float32.")
    _check_codes(codes, residual, patterns, roots, residual_scale)
    if x.ndim == 0 or x.shape[-1] != 8 * codes.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, and codes {tuple(codes.shape)} of 8 weights each.")
    if x.device != codes.device:
        raise ValueError(f"x lies on {x.device} and codes on {codes.device}: move them to one device.")
    y: Tensor = _e8p_linear(x.reshape(-1, x.shape[-1]), codes, residual, patterns, roots, float(residual_scale))
    return y.view(*x.shape[:-1], len(codes))


def e8p_decode(
    codes: Tensor,
    residual: Tensor | None = None,
    *,
    patterns: Tensor,
    roots: Tensor | None = None,
    residual_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The codewords (d_out, d_in) themselves, summed in float32 and rounded once to `dtype`.

    Args:
        codes: See `e8p_linear`, also for the others.
        residual: The second stage.
        patterns: The table of E8P.
        roots: The table of the 1-bit E8 codebook.
        residual_scale: What divides the second stage.
        dtype: float16, bfloat16 or float32.

    Raises:
        ValueError: Shapes, dtypes or devices that don't match.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype}: choose float16, bfloat16 or float32.")
    _check_codes(codes, residual, patterns, roots, residual_scale)
    c: Tensor = _e8p_decode(codes, residual, patterns, roots, float(residual_scale), dtype)
    return c


def _check_codes(
    codes: Tensor, residual: Tensor | None, patterns: Tensor, roots: Tensor | None, residual_scale: float
) -> None:
    if codes.dtype != torch.int16 or codes.ndim != 2 or codes.shape[1] == 0:
        raise ValueError(f"codes are {codes.dtype} of shape {tuple(codes.shape)}: give int16 (d_out, d_in / 8).")
    if residual is not None:
        if residual.dtype not in (torch.int16, torch.uint8):
            raise ValueError(f"residual is {residual.dtype}: give int16 (4 bits) or uint8 (3 bits).")
        if residual.shape != codes.shape:
            raise ValueError(f"residual has shape {tuple(residual.shape)}, codes {tuple(codes.shape)}.")
        if not residual_scale > 0:
            raise ValueError(f"residual_scale={residual_scale} must be positive.")
    if (residual is not None and residual.dtype == torch.uint8) != (roots is not None):
        kind = "no residual" if residual is None else f"a residual of {residual.dtype}"
        raise ValueError(f"roots go with a uint8 residual, and only there: got {kind}, roots={roots is not None}.")
    for name, tensor in (("residual", residual), ("patterns", patterns), ("roots", roots)):
        if tensor is None:
            continue
        if name != "residual" and (tensor.dtype != torch.int32 or tuple(tensor.shape) != (256,)):
            raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}: take it from e8p_tables().")
        if tensor.device != codes.device:
            raise ValueError(f"codes lie on {codes.device} and {name} on {tensor.device}: move them to one device.")


@torch.library.custom_op(f"{_NAMESPACE}::e8p_linear", mutates_args=())
def _e8p_linear(
    x: Tensor, codes: Tensor, residual: Tensor | None, patterns: Tensor, roots: Tensor | None, residual_scale: float
) -> Tensor:
    y: Tensor = run(__package__, "e8p_linear", x, codes, residual, patterns, roots, residual_scale)
    return y


@_e8p_linear.register_fake
def _(
    x: Tensor, codes: Tensor, residual: Tensor | None, patterns: Tensor, roots: Tensor | None, residual_scale: float
) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


@torch.library.custom_op(f"{_NAMESPACE}::e8p_linear_backward", mutates_args=())
def _e8p_linear_backward(
    grad: Tensor, codes: Tensor, residual: Tensor | None, patterns: Tensor, roots: Tensor | None, residual_scale: float
) -> Tensor:
    grad_x: Tensor = run(__package__, "e8p_linear_backward", grad, codes, residual, patterns, roots, residual_scale)
    return grad_x


@_e8p_linear_backward.register_fake
def _(
    grad: Tensor, codes: Tensor, residual: Tensor | None, patterns: Tensor, roots: Tensor | None, residual_scale: float
) -> Tensor:
    return grad.new_empty(grad.shape[0], 8 * codes.shape[1])


@torch.library.custom_op(f"{_NAMESPACE}::e8p_decode", mutates_args=())
def _e8p_decode(
    codes: Tensor,
    residual: Tensor | None,
    patterns: Tensor,
    roots: Tensor | None,
    residual_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    c: Tensor = run(__package__, "e8p_decode", codes, residual, patterns, roots, residual_scale, dtype)
    return c


@_e8p_decode.register_fake
def _(
    codes: Tensor,
    residual: Tensor | None,
    patterns: Tensor,
    roots: Tensor | None,
    residual_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(codes.shape[0], 8 * codes.shape[1], dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, ctx.residual_scale = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _e8p_linear_backward(grad, *ctx.saved_tensors, ctx.residual_scale), None, None, None, None, None


_e8p_linear.register_autograd(_grad, setup_context=_keep)
