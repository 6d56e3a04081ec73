"""Compacter: bottleneck adapters whose projections are sums of Kronecker products (Karimi Mahabadi et al. 2021).

Shapes: ... any leading dimensions, d width of the hidden states, m width of the bottleneck, n Kronecker factor, r rank
of the fast weights. Where n does not divide a width, zeros fill it up to the next multiple, p.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_efficiency.adapters.bottleneck import SequentialAdapter
from hf_efficiency.adapters.shared import SharedParameter


def slow_weights(n: int) -> SharedParameter:
    """The matrices A_1 ... A_n, (n, n, n), that all projections of a model share (section 3.2).

    They start with variance 1/n, so that a product keeps the scale of its fast weights.
    """
    return SharedParameter("slow", torch.randn(n, n, n) * n**-0.5)


class Compacter(SequentialAdapter):
    """Both projections are W = sum_i A_i kron (s_i t_i), equations 4 and 5, with dense biases.

    Trains n r (p_d/n + p_m/n) numbers for each projection, which is r (d + m) where n divides both widths, and d + m
    biases; n^3 slow weights once for the whole model. The factors t of the up projection start at zero, so that the
    layer starts as it was.

    Args:
        d: Width of the hidden states.
        m: Width of the bottleneck.
        n: Kronecker factor, the number of terms of the sum.
        r: Rank of the fast weights B_i = s_i t_i.
        slow: From `slow_weights(n)`.
        non_linearity, dropout: As in `SequentialAdapter`.
    """

    def __init__(
        self, d: int, m: int, n: int, r: int, slow: SharedParameter, non_linearity: str, dropout: float
    ) -> None:
        super().__init__(non_linearity, dropout)
        wide, narrow = -(-d // n), -(-m // n)
        spread = (d * r) ** -0.25  # W of the down projection has the variance 1/d of a dense layer
        self.down_s = nn.Parameter(torch.randn(n, wide, r) * spread)
        self.down_t = nn.Parameter(torch.randn(n, r, narrow) * spread)
        self.down_bias = nn.Parameter(torch.zeros(m))
        self.up_s = nn.Parameter(torch.randn(n, narrow, r) * (m * r) ** -0.25)
        self.up_t = nn.Parameter(torch.zeros(n, r, wide))
        self.up_bias = nn.Parameter(torch.zeros(d))
        slow.join(self)
        self._slow = slow

    def down(self, hidden: Tensor) -> Tensor:
        """(..., d) to (..., m)."""
        return kronecker_product(hidden, self._slow.on(hidden), self.down_s, self.down_t, self.down_bias)

    def up(self, hidden: Tensor) -> Tensor:
        """(..., m) to (..., d)."""
        return kronecker_product(hidden, self._slow.on(hidden), self.up_s, self.up_t, self.up_bias)


def kronecker_product(x: Tensor, a: Tensor, s: Tensor, t: Tensor, bias: Tensor) -> Tensor:
    """x W + bias with W = sum_i a_i kron (s_i t_i), cut to the widths of x and the bias. W is never made.

    Args:
        x: (..., d_in).
        a: (n, n, n).
        s: (n, p_in/n, r).
        t: (n, r, p_out/n).
        bias: (d_out,).

    Returns:
        (..., d_out).
    """
    n, columns, _ = s.shape
    padded = nn.functional.pad(x, (0, n * columns - x.shape[-1]))
    rows = padded.reshape(*x.shape[:-1], n, columns)
    mixed = torch.einsum("...pc,icr->...ipr", rows, s)
    spread = torch.einsum("...ipr,ipq->...iqr", mixed, a.to(x.dtype))
    product = torch.einsum("...iqr,irk->...qk", spread, t)
    return product.flatten(-2)[..., : len(bias)] + bias
