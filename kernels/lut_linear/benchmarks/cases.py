"""Decode and prefill of common models. See `benchmarks/kernel_case.py`."""

from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from kernel_case import Case, Run
from torch import Tensor

from hf_efficiency.kernels.lut_linear import lut_linear, op, reference, row_lut_linear

_BLOCK = 64
_SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672))  # d_out, d_in


def cases() -> list[Case]:
    """Few rows, where bytes count, and many, forward and backward, where operations do."""
    few = [_product(n, *shape, nested) for shape in _SHAPES for n in (1, 4, 16) for nested in (True, False)]
    many = [_product(n, 4096, 14336, True) for n in (64, 512, 4096)]
    return [*few, *many, _backward(512, 4096, 14336), _backward(4096, 4096, 14336), _rows(1, 4096, 4096)]


def _weight(d_out: int, d_in: int, nested: bool, device: torch.device) -> tuple[list[Tensor | None], Tensor]:
    """Random codes, a table like NF4's and scales like those of normal weights; and what they stand for."""
    blocks = d_out * d_in // _BLOCK
    packed = torch.randint(0, 256, (d_out * d_in // 2,), device=device, dtype=torch.uint8)
    table = torch.linspace(-1, 1, 16, device=device)
    weight: list[Tensor | None]
    if nested:
        codes = torch.randint(0, 256, (blocks,), device=device, dtype=torch.uint8)
        scales = torch.rand(-(-blocks // reference.NESTED_BLOCK), device=device) / d_in**0.5
        weight = [packed, table, codes, torch.linspace(-1, 1, 256, device=device), scales]
        weight.append(torch.tensor(2 / d_in**0.5, device=device))
    else:
        weight = [packed, table, torch.rand(blocks, device=device) / d_in**0.5, None, None, None]
    return weight, reference.dense(*weight, d_out, d_in, _BLOCK).bfloat16()  # type: ignore[arg-type]


def _bytes(n: int, d_out: int, d_in: int, nested: bool) -> int:
    blocks = d_out * d_in // _BLOCK
    return d_out * d_in // 2 + (blocks + blocks // 64 if nested else 4 * blocks) + 2 * n * (d_in + d_out)


def _product(n: int, d_out: int, d_in: int, nested: bool) -> Case:
    def make(device: torch.device, seed: int) -> dict[str, Run]:
        torch.manual_seed(seed)
        weight, dense = _weight(d_out, d_in, nested, device)
        x = torch.randn(n, d_in, device=device, dtype=torch.bfloat16)
        packed, table, absmax, *scales = weight
        names = ("nested_map", "nested_absmax", "nested_offset")
        settings = dict(zip(names, scales, strict=True))
        runs: dict[str, Run] = {
            "kernel": lambda: lut_linear(x, packed, table, absmax, out_features=d_out, block_size=_BLOCK, **settings),
            "reference": partial(reference.linear, x, *weight, None, d_out, _BLOCK),
            "cuBLAS bf16": lambda: x @ dense.T,
        }
        if find_spec("bitsandbytes") is not None and device.type == "cuda":
            runs["bitsandbytes"] = _bitsandbytes(x, dense, nested)
        return runs

    goal = "75 % of copy bandwidth" if n == 1 else ""
    label = f"{n} x {d_in} -> {d_out}, scales in {8 if nested else 32} bits"
    return Case(label, _bytes(n, d_out, d_in, nested), 2 * n * d_out * d_in, make, goal=goal)


def _bitsandbytes(x: Tensor, dense: Tensor, nested: bool) -> Run:
    """Quantizes in its first run, so that a bitsandbytes that does not work here fails alone."""

    @cache
    def quantized() -> tuple[Any, Any]:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(dense, blocksize=_BLOCK, compress_statistics=nested, quant_type="nf4")
        return packed.t(), state

    def run() -> Tensor:
        import bitsandbytes

        packed, state = quantized()
        y: Tensor = bitsandbytes.matmul_4bit(x, packed, quant_state=state)
        return y

    return run


def _backward(n: int, d_out: int, d_in: int) -> Case:
    def make(device: torch.device, seed: int) -> dict[str, Run]:
        torch.manual_seed(seed)
        weight, dense = _weight(d_out, d_in, True, device)
        grad = torch.randn(n, d_out, device=device, dtype=torch.bfloat16)
        return {
            "kernel": lambda: op._linear_backward(grad, *weight, d_in, _BLOCK),
            "reference": partial(reference.linear_backward, grad, *weight, d_in, _BLOCK),
            "cuBLAS bf16": lambda: grad @ dense,
        }

    return Case(f"gradient {n} x {d_out} -> {d_in}", _bytes(n, d_out, d_in, True), 2 * n * d_out * d_in, make)


def _rows(n: int, d_out: int, d_in: int) -> Case:
    def make(device: torch.device, seed: int) -> dict[str, Run]:
        torch.manual_seed(seed)
        packed = torch.randint(0, 256, (d_out, d_in // 2), device=device, dtype=torch.uint8)
        tables = torch.randn(d_out, 16, device=device, dtype=torch.float16)
        x = torch.randn(n, d_in, device=device, dtype=torch.bfloat16)
        none = (None,) * 4
        dense = reference.dense(packed, tables, *none, d_out, d_in, 32).bfloat16()
        return {
            "kernel": lambda: row_lut_linear(x, packed, tables),
            "reference": partial(reference.linear, x, packed, tables, *none, None, d_out, 32),
            "cuBLAS bf16": lambda: x @ dense.T,
        }

    size = d_out * (d_in // 2 + 32) + 2 * n * (d_in + d_out)
    return Case(
        f"table a row, {n} x {d_in} -> {d_out}", size, 2 * n * d_out * d_in, make, goal="75 % of copy bandwidth"
    )
