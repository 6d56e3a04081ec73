"""Inputs of QuIP# layers of common models. See `benchmarks/kernel_case.py`."""

from functools import partial

import torch
from kernel_case import Case, Run

from hf_efficiency.kernels.hadamard import hadamard, reference
from hf_efficiency.quantization.hadamard import hadamard_matrix

_HALF = 2  # bytes of a bfloat16
_GOAL = "80 % of copy bandwidth"


def cases() -> list[Case]:
    """Prefill and decode rows; 28 and 172 are the bases of Llama's and Llama 2's inner widths."""
    sizes = ((4096, 1), (8192, 1), (14336, 28), (28672, 28))
    made = [_case(4096, n, m, _GOAL) for n, m in sizes]
    return made + [_case(1, n, m, "") for n, m in sizes] + [_case(4096, 11008, 172, "")]


def _case(rows: int, n: int, m: int, goal: str) -> Case:
    def make(device: torch.device, seed: int) -> dict[str, Run]:
        torch.manual_seed(seed)
        x = torch.randn(rows, n, device=device, dtype=torch.bfloat16)
        matrix = hadamard_matrix(m)
        base = None if m == 1 or matrix is None else matrix.to(device, torch.int8)
        signs = torch.randn(n, device=device).sign().to(torch.int8)
        return {
            "kernel": lambda: hadamard(x, base, before=signs),
            "reference": partial(reference.hadamard, x, base, signs, None, 1.0, False, n, n),
            "copy": lambda: x.clone(),
        }

    steps = (n // m).bit_length() - 1 + 2 * m * (m > 1)
    return Case(f"hadamard {rows} x {n}", 2 * rows * n * _HALF + n, rows * n * steps, make, goal=goal)
