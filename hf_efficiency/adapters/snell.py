"""SNELL: a sparse change of the weight out of two low-rank matrices and a kernel (Shen et al. 2024).

Shapes: d_in, d_out features of the layer, r rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_efficiency.adapters.dense import DenseDeltaAdapter

if TYPE_CHECKING:
    from hf_efficiency.adapters.base import BaseLinear


class SNELL(DenseDeltaAdapter):
    """delta = soft threshold of scale * k(b_i, a_j), with r (d_in + d_out) trained numbers.

    Followed from the paper: kernelized LoRA (section 3.2), where row i of B and row j of A meet in the mixed piecewise
    linear kernel k(b, a) = |b' - a'| - |b'' - a''| of their two halves, so that the rank of the delta is not bounded
    by r; and competition (section 3.3), where the share `sparsity` of the smallest magnitudes of the matrix becomes
    zero and the rest comes closer to zero by the threshold. Which weights survive is found anew at each step: no
    indices are stored, and the threshold counts as a constant in the backward pass.

    Ours: both halves start equal, so that the delta starts at exactly zero. There the threshold is zero too, and all
    weights survive, or nothing would ever be trained.

    Args:
        base: The layer.
        r: Rank, even.
        sparsity: Share of the weights that do not change.
        scale: Factor of the kernel.
        norm: Of the kernel's distances: 1, which makes it piecewise linear, or 2.
    """

    def __init__(self, base: BaseLinear, r: int, sparsity: float, scale: float, norm: int) -> None:
        super().__init__()
        self.sparsity, self.scale, self.norm = sparsity, scale, norm
        self.a = nn.Parameter(_twice(base.in_features, r // 2))
        self.b = nn.Parameter(_twice(base.out_features, r // 2))

    def dense_delta(self, known: dict[str, float]) -> Tensor:
        """The sparse delta (d_out, d_in)."""
        values = self.scale * mixed_kernel(self.b, self.a, self.norm)
        if "threshold" not in known:
            known["threshold"] = threshold_of(values.detach(), self.sparsity)
        return soft_threshold(values, known["threshold"])


def mixed_kernel(b: Tensor, a: Tensor, norm: int) -> Tensor:
    """k(b_i, a_j) of rows (d_out, r) and (d_in, r), a matrix (d_out, d_in), in float32 at least."""
    if b.dtype not in (torch.float32, torch.float64):
        b, a = b.float(), a.float()
    (b_plus, b_minus), (a_plus, a_minus) = b.chunk(2, dim=1), a.chunk(2, dim=1)
    distances = [
        torch.cdist(left, right, p=norm, compute_mode="donot_use_mm_for_euclid_dist")
        for left, right in ((b_plus, a_plus), (b_minus, a_minus))
    ]
    return distances[0] - distances[1]


def threshold_of(values: Tensor, sparsity: float) -> float:
    """The largest magnitude among the share `sparsity` of the smallest ones; 0 where that is none."""
    losers = int(sparsity * values.numel())
    return float(values.abs().flatten().kthvalue(losers).values) if losers else 0.0


def soft_threshold(values: Tensor, threshold: float) -> Tensor:
    """Brings values closer to zero by the threshold; those up to it are zero and have no gradient, unless it is 0."""
    return values - values.clamp(-threshold, threshold) if threshold > 0 else values


def _twice(rows: int, columns: int) -> Tensor:
    half = nn.init.kaiming_uniform_(torch.empty(rows, columns), a=5**0.5)
    return torch.cat([half, half], dim=1)
