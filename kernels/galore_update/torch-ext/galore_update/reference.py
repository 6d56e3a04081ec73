"""Plain torch: the truth in tests, and what runs without a kernel.

Shape legend: weight and gradient (m, n), rank r. On the left the projection P is (m, r) and R = Pᵀ G (r, n); on the
right P is (n, r) and R = G P (m, r). The states have the shape of R.
"""

from functools import cache

import torch
from torch import Tensor

BLOCK = 256  # elements of a state, row by row, that share one scale


def dynamic_map(signed: bool, device: torch.device | None = None) -> Tensor:
    """The 256 values in [-1, 1] that codes stand for, ascending, float32."""
    return torch.tensor(_map_values(signed), dtype=torch.float32, device=device)


@cache
def _map_values(signed: bool) -> list[float]:
    """The dynamic tree type of Dettmers et al. 2022 (section 1.3), and its unsigned form (section 2.2), whose sign bit
    serves the fraction. Leading zeros count the power of ten; the bits left divide [0.1, 1] evenly, and a code stands
    for the middle of its part. Decade i of 7 so has 2^i values, twice as many without a sign. Zero and 1 complete them.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2 ** (decade if signed else decade + 1)
        middles = [10.0 ** (decade - 6) * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
        values += middles + ([-x for x in middles] if signed else [])
    return sorted(values)


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (uint8, the shape of x) and the largest magnitude of each block of 256, (ceil(numel / 256),) float32.

    A value takes the nearest code. A block of zeros has magnitude 0.
    """
    count = x.numel()
    blocks = -(-count // BLOCK)
    flat = torch.nn.functional.pad(x.float().reshape(-1), (0, -count % BLOCK)).view(blocks, BLOCK)
    absmax = flat.abs().amax(1)
    scaled = flat / absmax.clamp(min=1e-37).unsqueeze(1)
    values = dynamic_map(signed, x.device)
    codes = torch.bucketize(scaled, (values[1:] + values[:-1]) / 2)
    return codes.to(torch.uint8).reshape(-1)[:count].view(x.shape), absmax


def dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """float32 of the shape of `codes`, from what `quantize` returns."""
    values = dynamic_map(signed, codes.device)[codes.long()]
    scales = absmax.repeat_interleave(BLOCK)[: codes.numel()]
    return values * scales.view(codes.shape)


def low_rank_step(
    grad: Tensor,
    projection: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    correction1: float,
    correction2: float,
    right: bool,
) -> Tensor:
    """One step of Adam on the projected gradient (GaLore, Algorithm 2). Changes the float32 states in place.

    Returns:
        The normalized step N, of the shape of the states, in the dtype of `projection`.
    """
    wide, p = grad.float(), projection.float()
    low = wide @ p if right else p.T @ wide
    exp_avg.mul_(beta1).add_(low, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(low, low, value=1 - beta2)
    step = (exp_avg / correction1) / ((exp_avg_sq / correction2).sqrt() + eps)
    return step.to(projection.dtype)


def low_rank_step_8bit(
    grad: Tensor,
    projection: Tensor,
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    correction1: float,
    correction2: float,
    right: bool,
) -> Tensor:
    """`low_rank_step` with states that are kept as 8-bit codes. The step is taken before they are rounded again."""
    first = dequantize(exp_avg, exp_avg_absmax, signed=True)
    second = dequantize(exp_avg_sq, exp_avg_sq_absmax, signed=False)
    step = low_rank_step(grad, projection, first, second, beta1, beta2, eps, correction1, correction2, right)
    for state, codes, absmax, signed in (
        (first, exp_avg, exp_avg_absmax, True),
        (second, exp_avg_sq, exp_avg_sq_absmax, False),
    ):
        new_codes, new_absmax = quantize(state, signed)
        codes.copy_(new_codes)
        absmax.copy_(new_absmax)
    return step


def apply_step_(weight: Tensor, projection: Tensor, step: Tensor, keep: float, rate: float, right: bool) -> None:
    """weight * keep - rate * (P N, or N Pᵀ), in float32 and rounded once, in place. step is N of `low_rank_step`."""
    p, n = projection.float(), step.float()
    update = n @ p.T if right else p @ n
    weight.copy_(weight.float() * keep - rate * update)
