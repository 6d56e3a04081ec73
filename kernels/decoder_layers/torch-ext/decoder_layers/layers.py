"""Modules whose `forward` the `kernels` library puts in the place of a model's own."""

import torch
from torch import Tensor, nn

from .op import rms_norm, silu_mul


class RMSNorm(nn.Module):
    """For `LlamaRMSNorm` and its many copies: a `weight` (d,) and a `variance_epsilon`."""

    can_torch_compile = True
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., d) to the same shape."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class GatedMLP(nn.Module):
    """For `LlamaMLP` and its copies: `down_proj(silu(gate_proj(x)) * up_proj(x))`, whatever the projections are."""

    can_torch_compile = True
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) to the same shape."""
        y: Tensor = self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))
        return y


class SiLUAndMul(nn.Module):
    """For one fused projection: the first half of the last dimension gates the second."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """x (..., 2 d) to (..., d)."""
        gate, up = torch.chunk(x, 2, dim=-1)
        return silu_mul(gate, up)
