"""The dtype in which blocks run while they are calibrated."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hf_efficiency.calibration.structure import is_linear

# Sizes of the product that is timed: large enough to reach the CPU's rate, a few milliseconds long.
_ROWS, _FEATURES = 512, 768
_REPEATS = 3
# How much faster float32 must be to be chosen: no run may depend on the noise of a clock.
_CLEARLY = 1.2


@cache
def _rate(dtype: torch.dtype) -> float:
    """Products of a linear layer a second, on the CPU in the number of threads that is set."""
    x, w = torch.ones(_ROWS, _FEATURES, dtype=dtype), torch.ones(_FEATURES, _FEATURES, dtype=dtype)
    best = float("inf")
    for _ in range(_REPEATS + 1):  # the first one warms up
        start = time.perf_counter()
        nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return 1 / best


def working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a block of weights in `dtype` is best run: its own, or float32 where that is faster.

    CPUs differ by a factor of four: with bfloat16 instructions of full rate half precision is twice as fast as float32,
    without them, or with those of AVX-512 on some, half as fast.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    return torch.float32 if _rate(torch.float32) > _CLEARLY * _rate(dtype) else dtype


def cast_floating(tree: Any, dtype: torch.dtype) -> Any:
    """Nested lists, tuples and dictionaries with every floating tensor in `dtype`."""
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


@contextmanager
def widened(block: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The block's half-precision parameters and buffers are in `dtype` while this lasts, if that is wider."""
    half = (torch.bfloat16, torch.float16)
    changed = [(t, t.dtype) for t in (*block.parameters(), *block.buffers()) if t.dtype in half and dtype not in half]
    for tensor, _ in changed:
        tensor.data = tensor.data.to(dtype)
    try:
        yield
    finally:
        for tensor, original in changed:
            tensor.data = tensor.data.to(original)


@contextmanager
def wide_products(block: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The block's linear layers hold their weights and multiply in `dtype`; what passes between layers stays as it is.

    Next to `widened` it halves what waits between layers, for a few casts.
    """
    outside = [dtype]  # of the input of the layer that is running: they run one after the other

    def cast_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        outside[0] = args[0].dtype
        return cast_floating(args, dtype)

    def cast_output(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.to(outside[0])

    with ExitStack() as stack:
        for layer in filter(is_linear, block.modules()):
            stack.enter_context(widened(layer, dtype))
            stack.callback(layer.register_forward_pre_hook(cast_input).remove)
            stack.callback(layer.register_forward_hook(cast_output).remove)
        yield
