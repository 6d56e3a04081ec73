"""The step of one projected weight: its subspace, Adam in it, and the way back (GaLore; APOLLO's scaled gradient).

Shape legend: weight and gradient (m, n). On the left the projection P is (m, r) and R = Pᵀ G (r, n); on the right P is
(n, r) and R = G P (m, r). The moments have the shape of R.
"""

from typing import Any

import torch
from torch import Tensor

from hf_efficiency.kernels.galore_update import galore_update_, galore_update_8bit_
from hf_efficiency.optim.moments import (
    adam_direction_,
    add_to_,
    create_moments,
    moment_bytes,
    read_moments,
    wide_dtype,
    write_moments,
)
from hf_efficiency.optim.options import GaLoreOptions
from hf_efficiency.optim.projection import (
    FIRST_BASIS,
    dequantize_projection,
    power_step,
    projection_bytes,
    quantize_projection,
    random_basis,
    similarity,
)

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def stands_right(shape: tuple[int, ...], side: str) -> bool:
    """Whether the projection stands on the right of a gradient of this shape."""
    return side == "right" or (side == "auto" and shape[0] >= shape[1])


def low_rank_bytes(shape: tuple[int, ...], options: GaLoreOptions, element_size: int) -> int:
    """Bytes that a projected weight (m, n) keeps: both moments of R, and the projection.

    With 32 bits 8 r n + 4 r m on the left of a float32 weight; nothing of the size of the weight.
    """
    rank = options.rank or 0
    m, n = shape
    inner, outer = (n, m) if stands_right(shape, options.side) else (m, n)
    kept = (
        0 if options.projection == "random" else projection_bytes(inner * rank, options.projection_bits, element_size)
    )
    return moment_bytes(rank * outer, options.state_bits, max(element_size, 4)) + kept


@torch.no_grad()
def low_rank_step_(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Any],
    options: GaLoreOptions,
    seed: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of a projected weight; changes the weight and its state in place.

    Args:
        weight: (m, n).
        gradient: (m, n).
        state: Tensors and numbers only. Empty before the first step.
        options: Those of the weight's group.
        seed: Of this weight.
        lr: η.
        betas: β1, β2.
        eps: ε.
        weight_decay: λ, decoupled.

    Raises:
        ValueError: A gradient with NaN or infinity where a subspace would have to be found from it.
    """
    right = stands_right(weight.shape, options.side)
    if not state:
        rank, outer = options.rank or 0, weight.shape[0 if right else 1]
        state.update(step=0, refresh_at=0, gap=options.update_proj_gap, similar=0, seed=seed)
        create_moments(state, torch.Size((outer, rank) if right else (rank, outer)), weight, options.state_bits)
    if state["step"] >= state["refresh_at"]:
        _refresh(gradient, state, options, seed, right)
    state["step"] += 1
    basis = _basis(state, weight, options, right)
    if options.update != "project_back":
        _scaled_gradient_(weight, gradient, basis, state, options, right, lr, betas, eps, weight_decay)
    elif _has_kernel(weight):
        update = galore_update_ if options.state_bits == 32 else galore_update_8bit_
        moments = [
            state[name] for name in ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax") if name in state
        ]
        update(
            weight, gradient, basis, *moments, step=state["step"], lr=lr, beta1=betas[0], beta2=betas[1], eps=eps,
            weight_decay=weight_decay, scale=options.scale, side="right" if right else "left",
        )  # fmt: skip
    else:
        _, direction = _direction(gradient, basis.to(wide_dtype(weight.dtype)), state, right, betas, eps)
        _project_back_(weight, basis, direction, right, keep=1 - lr * weight_decay, rate=-lr * options.scale)


def _has_kernel(weight: Tensor) -> bool:
    return weight.is_cuda and weight.dtype in _KERNEL_DTYPES


def _refresh(gradient: Tensor, state: dict[str, Any], options: GaLoreOptions, seed: int, right: bool) -> None:
    """A new basis, and when the next one is due."""
    rank = options.rank or 0
    drawn = (seed * 1_000_003 + state["step"]) % 2**63
    if options.projection == "random":
        state["seed"] = drawn
    else:
        wide = gradient.to(wide_dtype(gradient.dtype))
        wide = wide.T if right else wide
        if not wide.isfinite().all():
            raise ValueError(
                f"The gradient of a weight {tuple(gradient.shape)} has NaN or infinite elements at its step "
                f"{state['step']}, when its subspace is due: lower the learning rate or skip such batches."
            )
        old = _basis(state, gradient, options, right).to(wide.dtype) if "projection" in state else None
        if old is not None and options.projection == "power":
            basis = power_step(wide, old)
        else:
            basis = FIRST_BASIS[options.projection](wide, rank, drawn)
        if old is not None and options.lazy_threshold is not None:
            _adapt_gap(state, options, similarity(old, basis))
        _store_basis(state, basis, gradient.dtype, options)
    state["refresh_at"] = state["step"] + state["gap"]


def _adapt_gap(state: dict[str, Any], options: GaLoreOptions, similar: float) -> None:
    """Q-GaLore's lazy update (section 3.3): after k similar refreshes running, half as many."""
    state["similar"] = state["similar"] + 1 if similar >= (options.lazy_threshold or 0) else 0
    if state["similar"] >= options.lazy_patience:
        state["gap"] *= 2
        state["similar"] = 0


def _store_basis(state: dict[str, Any], basis: Tensor, dtype: torch.dtype, options: GaLoreOptions) -> None:
    if options.projection_bits is None:
        state["projection"] = basis.to(dtype).contiguous()
    else:
        codes, scale, low = quantize_projection(basis, options.projection_bits)
        state.update(projection=codes, projection_scale=scale, projection_min=low)


def _basis(state: dict[str, Any], weight: Tensor, options: GaLoreOptions, right: bool) -> Tensor:
    """The current projection in the dtype of the weight."""
    shape = (weight.shape[1 if right else 0], options.rank or 0)
    if options.projection == "random":
        return random_basis(shape, state["seed"], weight)
    if options.projection_bits is None:
        return state["projection"]
    codes, scale, low = (state[name] for name in ("projection", "projection_scale", "projection_min"))
    return dequantize_projection(codes, scale, low, options.projection_bits, shape).to(weight.dtype)


def _direction(
    gradient: Tensor, basis: Tensor, state: dict[str, Any], right: bool, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor]:
    """R and Adam's direction N, both of the shape of the moments and in their dtype."""
    wide = gradient.to(basis.dtype)
    low = wide @ basis if right else basis.T @ wide
    first, second = read_moments(state)
    low = low.to(first.dtype)
    direction = adam_direction_(low, first, second, state["step"], betas, eps)
    write_moments(state, first, second)
    return low, direction


def _project_back_(weight: Tensor, basis: Tensor, direction: Tensor, right: bool, keep: float, rate: float) -> None:
    """weight * keep + rate * (P N, or N Pᵀ), in place. One pass over the weight where no dtype changes."""
    # as in the kernel, N is rounded to the dtype of the weight
    wide = wide_dtype(weight.dtype)
    p, n = basis.to(wide), direction.to(weight.dtype).to(wide)
    left, other = (n, p.T) if right else (p, n)
    if weight.dtype == wide:
        weight.addmm_(left, other, beta=keep, alpha=rate)
    else:
        weight.copy_(torch.addmm(weight.to(wide), left, other, beta=keep, alpha=rate))


def _scaled_gradient_(
    weight: Tensor,
    gradient: Tensor,
    basis: Tensor,
    state: dict[str, Any],
    options: GaLoreOptions,
    right: bool,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """APOLLO (Algorithm 1): the gradient times ||N|| / ||R||, for each channel along the longer side, or for all."""
    low, direction = _direction(gradient, basis.to(wide_dtype(weight.dtype)), state, right, betas, eps)
    axis = (1 if right else 0) if options.update == "channel" else None
    norms = [torch.linalg.vector_norm(x, dim=axis, keepdim=True) for x in (direction, low)]
    update = gradient.to(low.dtype) * (norms[0] / norms[1].clamp(min=1e-30)) * options.scale
    if options.growth_limit is not None:
        norm = torch.linalg.vector_norm(update)
        before = state.get("update_norm")
        if before is not None:
            allowed = options.growth_limit * before
            factor = torch.where((norm > allowed) & (before > 0), allowed / norm.clamp(min=1e-30), 1.0)
            update, norm = update * factor, norm * factor
        state["update_norm"] = norm
    add_to_(weight, update, keep=1 - lr * weight_decay, rate=-lr)
