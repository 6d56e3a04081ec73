"""Plain torch: the truth in tests, and what runs without a kernel.

Shape legend: n rows, d features.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) in float32, rounded to the dtype of x, times `weight`. x (n, d), weight (d,)."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` with respect to x (n, d) and weight (d,) for grad (n, d)."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    scaled = wide * inverse
    inner = grad.float() * weight.float()
    grad_x = inverse * (inner - scaled * (inner * scaled).mean(-1, keepdim=True))
    grad_weight = (grad.float() * scaled.to(x.dtype).float()).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in float32, rounded once. Both (n, d)."""
    wide = gate.float()
    return (wide * torch.sigmoid(wide) * up.float()).to(gate.dtype)


def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `silu_mul` with respect to gate and up. All (n, d)."""
    g, wide, other = grad.float(), gate.float(), up.float()
    s = torch.sigmoid(wide)
    return (g * other * s * (1 + wide * (1 - s))).to(gate.dtype), (g * wide * s).to(up.dtype)
