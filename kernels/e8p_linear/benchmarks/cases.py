"""Layers of common models, without their rotations. See `benchmarks/kernel_case.py`."""

from functools import partial

import torch
from kernel_case import Case, Run

from hf_efficiency.kernels.e8p_linear import e8p_linear, e8p_tables, reference

_HALF = 2  # bytes of a bfloat16
_GOAL = "2x cuBLAS bf16"


def cases() -> list[Case]:
    """Decode, a small batch, and prefill."""
    made = [_case(1, d_out, d_in, bits, _GOAL) for d_out, d_in in ((4096, 4096), (14336, 4096)) for bits in (2, 3, 4)]
    made += [_case(rows, 4096, 4096, bits, "") for rows in (4, 16, 64) for bits in (2, 4)]
    return [*made, _case(1, 1024, 4096, 2, ""), _case(4096, 4096, 4096, 2, "")]


def _case(rows: int, d_out: int, d_in: int, bits: int, goal: str) -> Case:
    shape = (d_out, d_in // 8)

    def make(device: torch.device, seed: int) -> dict[str, Run]:
        torch.manual_seed(seed)
        patterns, roots = e8p_tables(device)
        x = torch.randn(rows, d_in, device=device, dtype=torch.bfloat16)
        codes, other = (torch.randint(-(1 << 15), 1 << 15, shape, device=device).to(torch.int16) for _ in range(2))
        residual = {2: None, 3: (other & 255).to(torch.uint8), 4: other}[bits]
        own, scale = (roots if bits == 3 else None), 3.7
        dense = torch.randn(d_out, d_in, device=device, dtype=torch.bfloat16)
        return {
            "kernel": lambda: e8p_linear(x, codes, residual, patterns=patterns, roots=own, residual_scale=scale),
            "reference": partial(reference.e8p_linear, x, codes, residual, patterns, own, scale),
            "cuBLAS bf16": lambda: x @ dense.T,
        }

    moved = d_out * d_in * bits // 8 + rows * (d_in + d_out) * _HALF
    return Case(f"{bits} bits, {rows} rows, {d_out} x {d_in}", moved, 2 * rows * d_out * d_in, make, goal=goal)
