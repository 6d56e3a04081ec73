"""Shapes of common models. See `benchmarks/kernel_case.py`."""

from functools import partial

import torch
from kernel_case import Case, Run
from torch.nn import functional as F

from hf_efficiency.kernels.decoder_layers import reference, rms_norm, silu_mul

_HALF = 2  # bytes of a bfloat16


def cases() -> list[Case]:
    """Prefill and decode rows."""
    norms = [_norm(n, d) for n in (1, 4096) for d in (4096, 8192)]
    return norms + [_gate(n, d) for n, d in ((1, 14336), (4096, 14336))]


def _norm(n: int, d: int) -> Case:
    def make(device: torch.device, seed: int) -> dict[str, Run]:
        torch.manual_seed(seed)
        x = torch.randn(n, d, device=device, dtype=torch.bfloat16)
        w = torch.randn(d, device=device, dtype=torch.bfloat16)
        return {
            "kernel": lambda: rms_norm(x, w, 1e-6),
            "reference": partial(reference.rms_norm, x, w, 1e-6),
            "torch": lambda: F.rms_norm(x, (d,), w, 1e-6),
        }

    return Case(f"rms_norm {n} x {d}", (2 * n * d + d) * _HALF, 4 * n * d, make)


def _gate(n: int, d: int) -> Case:
    def make(device: torch.device, seed: int) -> dict[str, Run]:
        torch.manual_seed(seed)
        gate, up = (torch.randn(n, d, device=device, dtype=torch.bfloat16) for _ in range(2))
        return {
            "kernel": lambda: silu_mul(gate, up),
            "reference": partial(reference.silu_mul, gate, up),
            "torch": lambda: F.silu(gate) * up,
        }

    return Case(f"silu_mul {n} x {d}", 3 * n * d * _HALF, 5 * n * d, make)
