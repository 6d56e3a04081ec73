"""The operator: checked arguments, its meta implementation, its gradient.

Shape legend: n length of the transform, n_in of the input, n_out of the output, m order of the base.
"""

from typing import Any

import torch
from torch import Tensor

from ._launch import namespace, run

_NAMESPACE = namespace(__package__)


def hadamard(
    x: Tensor,
    base: Tensor | None = None,
    *,
    before: Tensor | None = None,
    after: Tensor | None = None,
    scale: float = 1.0,
    transpose: bool = False,
    length: int | None = None,
    out_length: int | None = None,
) -> Tensor:
    """`after * (H (before * x)) * scale` with the orthonormal `H = (Sylvester(n / m) (x) base) / sqrt(n)`.

    This is the incoherence processing of QuIP# (Tseng et al. 2024, section 3), where `before` and `after` are random
    signs, or real vectors after fine-tuning. Computed in float32 and rounded once. Differentiable in x.

    Args:
        x: (..., n_in) float16, bfloat16 or float32, n_in <= n.
        base: (m, m) int8, a Hadamard matrix of +1 and -1; None stands for m = 1.
        before: (n_in,) float32, or int8 signs of which only +1 and -1 are allowed (faster).
        after: (n_out,) float32, or int8 signs.
        scale: A factor on the result.
        transpose: Apply H^T, which is the inverse of H.
        length: n, m times a power of two; None stands for n_in. Zeros are put after x.
        out_length: n_out, how many of the n results are kept; None stands for n.

    Returns:
        (..., n_out) in the dtype of x.

    Raises:
        ValueError: Shapes, devices or dtypes that don't match, a length that the base doesn't divide into a power of
            two, or a vector that asks for a gradient.
    """
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"x is {x.dtype}: cast it to float16, bfloat16 or float32.")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: its last dimension must not be empty.")
    n_in = x.shape[-1]
    n = n_in if length is None else length
    n_out = n if out_length is None else out_length
    _check_base(x, base, n)
    if not 1 <= n_in <= n or not 1 <= n_out <= n:
        raise ValueError(f"x has {n_in} columns and the result {n_out}: both must be between 1 and length={n}.")
    _check_vector("before", before, n_in, x)
    _check_vector("after", after, n_out, x)
    y: Tensor = _hadamard(x.reshape(-1, n_in), base, before, after, float(scale), transpose, n, n_out)
    return y.view(*x.shape[:-1], n_out)


def _check_base(x: Tensor, base: Tensor | None, n: int) -> None:
    m = 1
    if base is not None:
        if base.ndim != 2 or base.shape[0] != base.shape[1] or base.dtype != torch.int8:
            raise ValueError(f"base is {base.dtype} of shape {tuple(base.shape)}: give a square int8 matrix.")
        if base.device != x.device:
            raise ValueError(f"x lies on {x.device} and base on {base.device}: move them to one device.")
        m = len(base)
    quotient, rest = divmod(n, max(m, 1))
    if rest or quotient < 1 or quotient & (quotient - 1):
        raise ValueError(f"length {n} is no power of two times the base's order {m}: give another base or length.")


def _check_vector(name: str, vector: Tensor | None, size: int, x: Tensor) -> None:
    if vector is None:
        return
    if tuple(vector.shape) != (size,):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}, and the side it multiplies ({size},).")
    if vector.dtype not in (torch.int8, torch.float32):
        raise ValueError(f"{name} is {vector.dtype}: give float32, or int8 signs.")
    if vector.device != x.device:
        raise ValueError(f"x lies on {x.device} and {name} on {vector.device}: move them to one device.")
    if vector.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} asks for a gradient, and only x has one here: detach it, or multiply outside.")


@torch.library.custom_op(f"{_NAMESPACE}::hadamard", mutates_args=())
def _hadamard(
    x: Tensor,
    base: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    scale: float,
    transpose: bool,
    length: int,
    out_length: int,
) -> Tensor:
    y: Tensor = run(__package__, "hadamard", x, base, before, after, scale, transpose, length, out_length)
    return y


@_hadamard.register_fake
def _(
    x: Tensor,
    base: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    scale: float,
    transpose: bool,
    length: int,
    out_length: int,
) -> Tensor:
    return x.new_empty(x.shape[0], out_length)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, base, before, after, ctx.scale, ctx.transpose, ctx.length, _ = inputs
    ctx.save_for_backward(base, before, after)
    ctx.n_in = x.shape[1]


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The adjoint: the same operator, transposed, its two vectors and lengths swapped."""
    base, before, after = ctx.saved_tensors
    grad_x = _hadamard(grad, base, after, before, ctx.scale, not ctx.transpose, ctx.length, ctx.n_in)
    return grad_x, None, None, None, None, None, None, None


_hadamard.register_autograd(_grad, setup_context=_keep)
