"""Adam's two moments in 32 bits, or in blocks of 8-bit codes (Dettmers et al. 2022), on any device.

The 8-bit format is that of the kernel project `galore_update`: the dynamic map, one float32 scale for each 256 elements
in row-major order. A state is a dict of tensors: `exp_avg` and `exp_avg_sq`, with 8 bits also `exp_avg_absmax` and
`exp_avg_sq_absmax`.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_efficiency.kernels.galore_update.reference import BLOCK, dynamic_map

_CHUNK = 1024 * BLOCK  # elements of a dense parameter that are in float at once
# A parameter that is not projected has 8-bit moments from this size on.
MIN_8BIT_SIZE = 4096
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}


def moment_bytes(count: int, bits: int, element_size: int = 4) -> int:
    """Bytes of both moments of `count` elements."""
    blocks = -(-count // BLOCK)
    return 2 * (count + 4 * blocks) if bits == 8 else 2 * count * element_size


def create_moments(state: dict[str, Any], shape: torch.Size, like: Tensor, bits: int) -> None:
    """Puts zero moments of `shape` into `state`, on the device of `like`; float64 for a float64 weight."""
    for name, signed in _SIGNED.items():
        if bits == 8:
            zero = encode(torch.zeros(1, device=like.device), signed)[0].item()
            state[name] = torch.full(shape, zero, dtype=torch.uint8, device=like.device)
            state[f"{name}_absmax"] = torch.zeros(-(-shape.numel() // BLOCK), device=like.device)
        else:
            state[name] = torch.zeros(shape, dtype=wide_dtype(like.dtype), device=like.device)


def read_moments(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Both moments as floats: the tensors of the state themselves where they have 32 bits."""
    if "exp_avg_absmax" not in state:
        return state["exp_avg"], state["exp_avg_sq"]
    return (
        decode(state["exp_avg"], state["exp_avg_absmax"], signed=True),
        decode(state["exp_avg_sq"], state["exp_avg_sq_absmax"], signed=False),
    )


def write_moments(state: dict[str, Any], exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """Rounds new moments into an 8-bit state. A 32-bit state has changed in place already."""
    if "exp_avg_absmax" not in state:
        return
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        codes, absmax = encode(moment, _SIGNED[name])
        state[name].copy_(codes)
        state[f"{name}_absmax"].copy_(absmax)


def adam_direction_(
    gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """Adam: changes the moments in place and returns M̂ / (sqrt(V̂) + ε), of the shape of the gradient."""
    beta1, beta2 = betas
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    first, second = 1 - beta1**step, 1 - beta2**step
    # the correction of M goes into the denominator: one pass less
    denominator = exp_avg_sq.sqrt().mul_(first / second**0.5).add_(eps * first)
    return torch.div(exp_avg, denominator, out=denominator)


def adamw_8bit_(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Any],
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW with 8-bit moments on a parameter of any shape, part by part, so that no float moment is ever whole."""
    flat, flat_gradient = weight.reshape(-1), gradient.reshape(-1)
    exp_avg, exp_avg_sq = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
    for start in range(0, len(flat), _CHUNK):
        part, blocks = slice(start, start + _CHUNK), slice(start // BLOCK, (start + _CHUNK) // BLOCK)
        chunk = {
            "exp_avg": exp_avg[part],
            "exp_avg_absmax": state["exp_avg_absmax"][blocks],
            "exp_avg_sq": exp_avg_sq[part],
            "exp_avg_sq_absmax": state["exp_avg_sq_absmax"][blocks],
        }
        first, second = read_moments(chunk)
        direction = adam_direction_(flat_gradient[part].to(first.dtype), first, second, step, betas, eps)
        add_to_(flat[part], direction, keep=1 - lr * weight_decay, rate=-lr)
        write_moments(chunk, first, second)
    if flat.data_ptr() != weight.data_ptr():  # a weight that is not contiguous was copied
        weight.copy_(flat.view(weight.shape))


def add_to_(weight: Tensor, update: Tensor, keep: float, rate: float) -> None:
    """weight * keep + rate * update in place, rounded once."""
    if weight.dtype == update.dtype:
        weight.mul_(keep).add_(update, alpha=rate)
    else:
        weight.copy_(weight.to(update.dtype).mul_(keep).add_(update, alpha=rate))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and moments have."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def decode(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """float32 of the shape of `codes` (uint8), with one scale of `absmax` for each 256."""
    values, _ = _tables(signed, codes.device)
    flat = values.index_select(0, codes.reshape(-1).int())
    whole = len(flat) // BLOCK * BLOCK
    flat[:whole].view(-1, BLOCK).mul_(absmax[: whole // BLOCK].unsqueeze(1))
    if whole < len(flat):
        flat[whole:].mul_(absmax[-1])
    return flat.view(codes.shape)


def encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (uint8, the shape of x) and scales (ceil(numel / 256),) float32.

    A code is looked up by the value's float16, 50 times as fast as a search in the map. So a value that lies within
    2⁻¹² (relatively) of the middle between two of the map may take either.
    """
    _, table = _tables(signed, x.device)
    flat = x.reshape(-1)
    whole = len(flat) // BLOCK * BLOCK
    absmax = torch.empty(-(-len(flat) // BLOCK), dtype=torch.float32, device=x.device)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    flat_codes = codes.view(-1)
    for start, part in ((0, flat[:whole].view(-1, BLOCK)), (whole, flat[whole:].unsqueeze(0))):
        if part.numel():
            scales = absmax[start // BLOCK :][: len(part)]
            scales.copy_(part.abs().amax(1))
            halves = (part / scales.clamp(min=1e-37).unsqueeze(1)).half().view(-1)
            target = flat_codes[start : start + part.numel()]
            torch.index_select(table, 0, halves.view(torch.uint16).int(), out=target)
    return codes, absmax


@cache
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 values of the map, and the code of each of the 65,536 float16."""
    values = dynamic_map(signed)
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16).float().nan_to_num()
    table = torch.bucketize(halves, (values[1:] + values[:-1]) / 2).to(torch.uint8)
    return values.to(device), table.to(device)
