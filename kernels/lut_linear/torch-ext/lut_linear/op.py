"""The operators: checked arguments, meta implementations, gradients.

Shape legend: n rows, d_in, d_out features; m blocks of the flattened weight.
"""

import torch
from torch import Tensor

from ._launch import namespace, run

_NAMESPACE = namespace(__package__)
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCK = 256


def lut_linear(
    x: Tensor,
    packed: Tensor,
    table: Tensor,
    absmax: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    block_size: int,
    nested_map: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + bias for W = table[code] * scale, in bitsandbytes' 4-bit tensors (QLoRA, https://arxiv.org/abs/2305.14314).

    A block is `block_size` consecutive elements of the flattened W and may cross rows. With the three `nested` tensors
    the scale of block i is nested_map[absmax[i]] * nested_absmax[i // 256] + nested_offset. The result has a gradient
    with respect to x and `bias`, and none with respect to the packed weight.

    Args:
        x: (..., d_in) float16, bfloat16 or float32.
        packed: uint8 of ceil(d_out * d_in / 2) elements: two codes a byte, the first in the high nibble, by rows.
        table: (16,) float32.
        absmax: (m,) float32 scales; with the nested tensors their uint8 codes.
        bias: (d_out,) of a floating dtype.
        out_features: d_out.
        block_size: Elements that share a scale: a power of two from 32 to 4096.
        nested_map: (256,) float32.
        nested_absmax: (ceil(m / 256),) float32.
        nested_offset: () float32.

    Returns:
        (..., d_out) in the dtype of x. Sums are in float32.

    Raises:
        ValueError: Shapes, dtypes or devices that don't match, or a block size that the format lacks.
    """
    if block_size not in _BLOCK_SIZES:
        raise ValueError(f"block_size={block_size} must be one of {', '.join(map(str, _BLOCK_SIZES))}.")
    nested = {"nested_map": nested_map, "nested_absmax": nested_absmax, "nested_offset": nested_offset}
    missing = [name for name, value in nested.items() if value is None]
    if len(missing) not in (0, 3):
        raise ValueError(
            f"Double quantization needs {', '.join(nested)}, all or none; {', '.join(missing)} is missing."
        )
    blocks = -(-out_features * x.shape[-1] // block_size)
    _check("table", table, (16,), (torch.float32,))
    _check("absmax", absmax, (blocks,), (torch.float32 if missing else torch.uint8,))
    shapes = {"nested_map": (256,), "nested_absmax": (-(-blocks // _NESTED_BLOCK),), "nested_offset": ()}
    for name, value in nested.items():
        if value is not None:
            _check(name, value, shapes[name], (torch.float32,))
    _check_common(x, packed, out_features, {"table": table, "absmax": absmax, "bias": bias, **nested})
    y: Tensor = _linear(
        x.reshape(-1, x.shape[-1]), packed.contiguous(), table.contiguous(), absmax.contiguous(),
        *(None if value is None else value.contiguous() for value in nested.values()), bias, out_features, block_size,
    )  # fmt: skip
    return y.view(*x.shape[:-1], out_features)


def row_lut_linear(x: Tensor, packed: Tensor, tables: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias for W[o, i] = tables[o, code[o, i]], k-means codebooks (SqueezeLLM, https://arxiv.org/abs/2306.07629).

    The result has a gradient with respect to x and `bias`, and none with respect to codes and tables.

    Args:
        x: (..., d_in) float16, bfloat16 or float32; d_in is even.
        packed: (d_out, d_in / 2) uint8: two codes a byte, the first in the high nibble.
        tables: (d_out, 16) float16 or float32.
        bias: (d_out,) of a floating dtype.

    Returns:
        (..., d_out) in the dtype of x. Sums are in float32.

    Raises:
        ValueError: Shapes, dtypes or devices that don't match, or an odd d_in.
    """
    d_in, d_out = x.shape[-1], tables.shape[0]
    if d_in % 2:
        raise ValueError(f"d_in={d_in} is odd: a row of codes is whole bytes of two; pad x and the codes by a column.")
    _check("tables", tables, (d_out, 16), (torch.float16, torch.float32))
    _check("packed", packed, (d_out, d_in // 2), (torch.uint8,))
    _check_common(x, packed, d_out, {"tables": tables, "bias": bias})
    y: Tensor = _linear(
        x.reshape(-1, d_in), packed.contiguous(), tables.contiguous(), None, None, None, None, bias, d_out,
        _BLOCK_SIZES[0],
    )  # fmt: skip
    return y.view(*x.shape[:-1], d_out)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """ValueError unless a tensor has the shape and one of the dtypes that the format asks for."""
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be {' or '.join(map(str, dtypes))} of "
            f"shape {shape}."
        )


def _check_common(x: Tensor, packed: Tensor, d_out: int, others: dict[str, Tensor | None]) -> None:
    """ValueError for what both formats ask of x, codes and bias, and of the devices of all tensors."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"x is {x.dtype}: cast it to float16, bfloat16 or float32.")
    octets = -(-d_out * x.shape[-1] // 2)
    if packed.dtype != torch.uint8 or packed.numel() != octets:
        raise ValueError(
            f"packed holds {packed.numel()} elements of {packed.dtype}; a weight of shape ({d_out}, {x.shape[-1]}) is "
            f"{octets} of torch.uint8."
        )
    bias = others["bias"]
    if bias is not None and (bias.shape != (d_out,) or not bias.is_floating_point()):
        raise ValueError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)}; it must be floating, of shape ({d_out},)."
        )
    for name, tensor in {"packed": packed, **others}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x lies on {x.device} and {name} on {tensor.device}: move them to one device.")


@torch.library.custom_op(f"{_NAMESPACE}::linear", mutates_args=())
def _linear(
    x: Tensor,
    packed: Tensor,
    table: Tensor,
    absmax: Tensor | None,
    nested_map: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    block_size: int,
) -> Tensor:
    y: Tensor = run(
        __package__, "linear", x, packed, table, absmax, nested_map, nested_absmax, nested_offset, bias, out_features,
        block_size,
    )  # fmt: skip
    return y


@_linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    table: Tensor,
    absmax: Tensor | None,
    nested_map: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    block_size: int,
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


@torch.library.custom_op(f"{_NAMESPACE}::linear_backward", mutates_args=())
def _linear_backward(
    grad: Tensor,
    packed: Tensor,
    table: Tensor,
    absmax: Tensor | None,
    nested_map: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    block_size: int,
) -> Tensor:
    grad_x: Tensor = run(
        __package__, "linear_backward", grad, packed, table, absmax, nested_map, nested_absmax, nested_offset,
        in_features, block_size,
    )  # fmt: skip
    return grad_x


@_linear_backward.register_fake
def _(
    grad: Tensor,
    packed: Tensor,
    table: Tensor,
    absmax: Tensor | None,
    nested_map: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    block_size: int,
) -> Tensor:
    return grad.new_empty(grad.shape[0], in_features)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    x, *weight, bias, _, block_size = inputs
    ctx.save_for_backward(*weight)  # type: ignore[arg-type]
    ctx.sizes = (x.shape[1], block_size)  # type: ignore[attr-defined]
    ctx.bias_dtype = None if bias is None else bias.dtype  # type: ignore[attr-defined]


def _grads(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad  # type: ignore[attr-defined]
    grad_x = _linear_backward(grad, *ctx.saved_tensors, *ctx.sizes) if wanted[0] else None  # type: ignore[attr-defined]
    grad_bias = grad.float().sum(0).to(ctx.bias_dtype) if wanted[7] else None  # type: ignore[attr-defined]
    return grad_x, None, None, None, None, None, None, grad_bias, None, None


_linear.register_autograd(_grads, setup_context=_keep)
