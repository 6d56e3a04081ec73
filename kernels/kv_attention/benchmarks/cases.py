"""One new token over the caches of an 8B Llama. See `benchmarks/kernel_case.py`."""

from functools import partial

import torch
from kernel_case import Case, Run
from torch import Tensor
from torch.nn import functional as F

from hf_efficiency.kernels.kv_attention import (
    decode_attention,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
    quantized_decode_attention,
    reference,
)

_H, _K, _D = 32, 8, 128
_HALF, _SINGLE = 2, 4  # bytes
_GROUP, _RESIDUAL = 32, 16
_SCALE = _D**-0.5


def cases() -> list[Case]:
    """Dense with and without the sums, then packed."""
    sizes = [(b, n) for b in (1, 8) for n in (4096, 32768)]
    made = [_dense(b, n, with_sums) for b, n in sizes for with_sums in (False, True)]
    return made + [_packed(b, n, bits) for b, n in sizes for bits in (2, 4, 8)]


def _inputs(b: int, n: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    shapes = (b, _H, 1, _D), (b, _K, n, _D), (b, _K, n, _D)
    query, key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes)
    return query, key, value


def _results(made: tuple[Tensor, Tensor | None]) -> Tensor | tuple[Tensor, ...]:
    output, sums = made
    return output if sums is None else (output, sums)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def _reference(query: Tensor, key: Tensor, value: Tensor, with_sums: bool) -> Tensor | tuple[Tensor, ...]:
    output, sums = reference.decode_attention(query, key, value, None, None, _SCALE, 0.0, True, with_sums)
    return _results((output.transpose(1, 2), sums if with_sums else None))


def _dense(b: int, n: int, with_sums: bool) -> Case:
    def make(device: torch.device, seed: int) -> dict[str, Run]:
        query, key, value = _inputs(b, n, device, seed)
        return {
            "kernel": lambda: _results(decode_attention(query, key, value, with_sums=with_sums)),
            "reference": partial(_reference, query, key, value, with_sums),
            "torch sdpa": lambda: _sdpa(query, key, value),
        }

    moved = 2 * b * (_H + _K * n) * _D * _HALF + (b * _K * n * _SINGLE if with_sums else 0)
    label = f"dense {b} x {n}{' with sums' if with_sums else ''}"
    return Case(label, moved, 4 * b * _H * n * _D, make, goal="the copy bandwidth at 32768 tokens")


def _packed(b: int, n: int, bits: int) -> Case:
    packed = n - _RESIDUAL - _RESIDUAL  # whole groups

    def make(device: torch.device, seed: int) -> dict[str, Run]:
        query, key, value = _inputs(b, packed + _RESIDUAL, device, seed)
        keys = quantize_keys(key[:, :, :packed], bits, _GROUP)
        values = quantize_values(value[:, :, :packed], bits, _GROUP)
        new_key, new_value = key[:, :, packed:], value[:, :, packed:]
        full = (
            torch.cat((dequantize_keys(keys, torch.bfloat16), new_key), 2),
            torch.cat((dequantize_values(values, torch.bfloat16), new_value), 2),
        )
        return {
            "kernel": lambda: _results(quantized_decode_attention(query, keys, values, new_key, new_value)),
            "reference": partial(_reference, query, *full, True),
            "torch sdpa": lambda: _sdpa(query, *full),
        }

    cache = 2 * packed * _D * bits // 8 + 2 * packed * _D // _GROUP * 2 * _HALF + 2 * _RESIDUAL * _D * _HALF
    tokens = packed + _RESIDUAL
    moved = b * (2 * _H * _D * _HALF + _K * (cache + tokens * _SINGLE))
    return Case(f"{bits} bits {b} x {tokens} with sums", moved, 4 * b * _H * tokens * _D, make)
