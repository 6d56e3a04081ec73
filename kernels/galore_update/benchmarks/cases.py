"""Weights of a Llama of 8B and the ranks of GaLore's paper. See `benchmarks/kernel_case.py`."""

from collections.abc import Callable

import torch
from kernel_case import Case, Run
from torch import Tensor

from hf_efficiency.kernels.galore_update import galore_update_, galore_update_8bit_, quantize_state, reference

_HALF, _FLOAT = 2, 4  # bytes of a bfloat16 and of a float32
_ADAM = (0.9, 0.999, 1e-8)
_RATES = {"lr": 1e-2, "scale": 0.25, "weight_decay": 0.01}
_KEEP, _RATE = 1 - 1e-2 * 0.01, 1e-2 * 0.25


def cases() -> list[Case]:
    """Projected on the left, the shorter side."""
    shapes = [(4096, n, r) for n in (4096, 14336) for r in (128, 256, 1024)]
    return [_case(*shape, bits) for bits in (32, 8) for shape in shapes]


def _case(m: int, n: int, r: int, bits: int) -> Case:
    def make(device: torch.device, seed: int) -> dict[str, Run]:
        torch.manual_seed(seed)
        weight, grad = (torch.randn(m, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        projection = torch.linalg.qr(torch.randn(m, r, device=device))[0].bfloat16()
        first, second = 0.1 * torch.randn(r, n, device=device), 0.1 * torch.rand(r, n, device=device)
        states = [first, second] if bits == 32 else [*quantize_state(first, True), *quantize_state(second, False)]
        functions = {
            "kernel": _kernel,
            "reference": _reference,
            "torch": _torch,
            "torch.compile": torch.compile(_torch),
        }
        return {name: _run(f, grad, projection, weight, states) for name, f in functions.items()}

    state = (2 * r * n) * _FLOAT if bits == 32 else 2 * r * n + 2 * (r * n // 256) * _FLOAT
    moved = 3 * m * n * _HALF + m * r * _HALF + 2 * state
    return Case(f"{m} x {n}, rank {r}, {bits}-bit states", moved, 4 * m * n * r, make)


def _run(function: Callable[..., None], grad: Tensor, projection: Tensor, weight: Tensor, states: list[Tensor]) -> Run:
    """With a weight and states of its own, since they change."""
    weight, states = weight.clone(), [state.clone() for state in states]

    def run() -> tuple[Tensor, ...]:
        function(weight, grad, projection, *states)
        return (weight, *states) if len(states) == 2 else (weight,)

    return run


def _kernel(weight: Tensor, grad: Tensor, projection: Tensor, *states: Tensor) -> None:
    update = galore_update_ if len(states) == 2 else galore_update_8bit_
    update(weight, grad, projection, *states, step=10, **_RATES)


def _reference(weight: Tensor, grad: Tensor, projection: Tensor, *states: Tensor) -> None:
    step = reference.low_rank_step if len(states) == 2 else reference.low_rank_step_8bit
    normalized = step(grad, projection, *states, *_ADAM, 1 - 0.9**10, 1 - 0.999**10, False)
    reference.apply_step_(weight, projection, normalized, _KEEP, _RATE, False)


def _torch(weight: Tensor, grad: Tensor, projection: Tensor, *states: Tensor) -> None:
    """Two products of bfloat16 matrices (cuBLAS) around Adam in plain torch."""
    low = (projection.T @ grad).float()
    if len(states) == 2:
        first, second = states
    else:
        first = reference.dequantize(states[0], states[1], True)
        second = reference.dequantize(states[2], states[3], False)
    first.mul_(0.9).add_(low, alpha=0.1)
    second.mul_(0.999).addcmul_(low, low, value=0.001)
    normalized = (first / (1 - 0.9**10)) / ((second / (1 - 0.999**10)).sqrt() + 1e-8)
    weight.addmm_(projection, normalized.to(weight.dtype), beta=_KEEP, alpha=-_RATE)
    if len(states) == 4:
        new = (*reference.quantize(first, True), *reference.quantize(second, False))
        for state, value in zip(states, new, strict=True):
            state.copy_(value)
