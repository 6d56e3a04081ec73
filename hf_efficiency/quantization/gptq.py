"""GPTQ: one column at a time, with the error of each spread over the columns still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (ICLR 2023),
Algorithm 1. Shape legend: d_out rows, d_in columns, g groups. Inside the solver weights are held as (d_in, d_out), so
that one column of the paper is one contiguous row of memory.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_efficiency.calibration.method import InputGroup
from hf_efficiency.calibration.statistics import all_finite
from hf_efficiency.quantization.affine import AffineGrid
from hf_efficiency.quantization.formats import AffineTensors, default_g_idx
from hf_efficiency.quantization.layers.affine import AffineLinear
from hf_efficiency.quantization.scheme import AffineMethod

_LAZY_COLUMNS = 64
_DAMP_RETRIES = 6
# Up to this size a triangular matrix is inverted by one call.
_SOLVED_WHOLE = 192


@dataclass(kw_only=True)
class GPTQ(AffineMethod):
    """One-shot quantization with second-order error feedback.

    Attributes:
        damp_percent: Share of the Hessian's mean diagonal that is added to the diagonal. Where the factorization
            still fails it is multiplied by 10, up to six times.
        desc_act: Columns in order of falling activation energy, with the scales of the groups fixed beforehand
            (static groups), so that the stored group index stays in order and kernels need no gather. It costs nothing
            at run time and is worth much (SmolLM2-135M at 4 bits: KL 0.12 against 0.20 without).
        true_sequential: Layers inside a block see inputs that passed through the quantized layers before them.
        clip: Search each group's range for the smallest error, weighted by what an error in each column costs after
            all later columns have made up for it. Off: the range from minimum to maximum.
    """

    calibrated: ClassVar[bool] = True
    statistics: ClassVar[frozenset[str]] = frozenset({"hessian"})

    damp_percent: float = 0.01
    desc_act: bool = True
    true_sequential: bool = True
    clip: bool = True

    def validate(self) -> None:
        """ValueError for values out of range."""
        super().validate()
        if not 0 < self.damp_percent < 1:
            raise ValueError(f"damp_percent={self.damp_percent} must lie between 0 and 1 (0.01 is usual).")

    def compress_group(self, group: InputGroup) -> None:
        """Quantizes the members together where they share a scheme: one factorization, one sweep over the columns."""
        by_scheme: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
        for i, name in enumerate(group.names):
            by_scheme[self.scheme(name)].append(i)
        order = group.hessian.diagonal().argsort(descending=True, stable=True) if self.desc_act else None
        inverse = inverse_factor(group.hessian, order, self.damp_percent, group.names[0])
        for (bits, group_size, sym), members in by_scheme.items():
            rows = torch.cat([group.weights()[i] for i in members])
            grid = AffineGrid(bits, group_size, sym, clip=self.clip)
            result = gptq_solve(rows, inverse, grid, order)
            start = 0
            for i in members:
                layer = group.new_layer(self, group.names[i])
                if not isinstance(layer, AffineLinear):
                    raise TypeError(f"GPTQ stores into AffineLinear, got {type(layer).__name__}.")
                rows_i = slice(start, start + layer.out_features)
                layer.pack(
                    AffineTensors(result.codes[rows_i], result.scales[rows_i], result.zeros[rows_i], result.g_idx)
                )
                group.store(group.names[i], layer)
                start = rows_i.stop


def inverse_factor(hessian: Tensor, order: Tensor | None, damp_percent: float, name: str) -> Tensor:
    """Upper Cholesky factor U of the inverse Hessian, H⁻¹ = Uᵀ U, (d_in, d_in), in the order of the columns.

    Raises:
        ValueError: If the damped Hessian is not positive definite even at the largest damping.
    """
    # With J the reversal of columns and J H J = L Lᵀ, the inverse has the factor U = J L⁻¹ J: one factorization and one
    # triangular inverse, where factorizing H, inverting it and factorizing again takes twice the work.
    columns = torch.arange(len(hessian), device=hessian.device) if order is None else order
    h = hessian[columns.flip(0)].index_select(1, columns.flip(0))
    diagonal = h.diagonal()
    mean = diagonal.mean()
    # A feature that never fired has no say: an identity row leaves its weights to plain rounding.
    diagonal[diagonal <= 0] = mean if mean > 0 else 1.0
    undamped = diagonal.clone()
    for attempt in range(_DAMP_RETRIES):
        damping = damp_percent * 10**attempt * mean.clamp(min=torch.finfo(h.dtype).tiny)
        diagonal.copy_(undamped + damping)
        lower, info = torch.linalg.cholesky_ex(h)
        if not info:
            factor = invert_lower(lower).flip(0, 1)
            if all_finite(factor):
                return factor
    raise ValueError(
        f"{name}: the Hessian is not positive definite, even with damp_percent raised from {damp_percent:g} to "
        f"{damp_percent * 10 ** (_DAMP_RETRIES - 1):g}. Use more calibration data (`num_samples`), or a larger "
        "`damp_percent`."
    )


def invert_lower(lower: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix (d, d), by halves: most of the work is in products, none on zeros."""
    d = lower.shape[0]
    inverse = torch.zeros_like(lower)
    if d <= _SOLVED_WHOLE:
        inverse.diagonal().fill_(1)
        return torch.linalg.solve_triangular(lower, inverse, upper=False)
    first, second = slice(0, d // 2), slice(d // 2, d)
    inverse[first, first] = invert_lower(lower[first, first])
    inverse[second, second] = invert_lower(lower[second, second])
    inverse[second, first] = -inverse[second, second] @ (lower[second, first] @ inverse[first, first])
    return inverse


def gptq_solve(weight: Tensor, inverse: Tensor, grid: AffineGrid, order: Tensor | None = None) -> AffineTensors:
    """Quantizes weight (d_out, d_in) float32 with the inverse factor of its Hessian.

    Args:
        weight: (d_out, d_in).
        inverse: `inverse_factor(...)`, in the same order of columns.
        grid: Bits, grouping and symmetry.
        order: Columns in the order in which they are quantized; None for the natural one.

    Returns:
        Codes, scales and zero points in the natural order of columns.
    """
    d_out, d_in = weight.shape
    g_idx = default_g_idx(d_in, grid.group_size, weight.device)
    # Rounding column i by e costs e² / U_ii² once the later columns have adapted (the paper's equation 2).
    cost = inverse.diagonal() ** -2
    if order is not None:
        cost = cost[order.argsort()]
    w = weight.T.clone(memory_format=torch.contiguous_format) if order is None else weight.T[order]
    size = d_in if grid.group_size == -1 else grid.group_size
    static = order is not None or grid.group_size == -1
    scales, zeros = grid.fit(weight, cost) if static else (weight.new_empty(d_out, int(g_idx[-1]) + 1) for _ in "sz")
    groups = (g_idx if order is None else g_idx[order]).tolist()
    step = _LAZY_COLUMNS if static else max(k for k in range(1, _LAZY_COLUMNS + 1) if size % k == 0)
    codes = torch.empty(d_in, d_out, dtype=torch.uint8, device=weight.device)
    group_grid = AffineGrid(grid.bits, -1, grid.sym, clip=grid.clip)
    scale_t, zero_t = scales.T.contiguous(), zeros.T.float().contiguous()
    # Every row of U over its diagonal, so that the columns' errors need not be divided one by one.
    spread = inverse / inverse.diagonal().unsqueeze(1)
    errors, rounded = (torch.empty(step, d_out, device=weight.device) for _ in range(2))
    # Views made once: picking rows one by one costs as much as the arithmetic of a narrow layer.
    error_rows, rounded_rows, scale_rows, zero_rows = (t.unbind() for t in (errors, rounded, scale_t, zero_t))
    for start in range(0, d_in, step):
        stop = min(start + step, d_in)
        if not static and start % size == 0:
            columns = slice(start, min(start + size, d_in))
            scale, zero = group_grid.fit(w[columns].T, cost[columns])
            scale_t[groups[start]], zero_t[groups[start]] = scale[:, 0], zero[:, 0]
        block = w[start:stop]
        for i, column in enumerate(block.unbind()):
            s, z = scale_rows[groups[start + i]], zero_rows[groups[start + i]]
            level, q, error = torch.addcdiv(z, column, s), rounded_rows[i], error_rows[i]
            torch.round(level, out=q).clamp_(0, grid.top)
            torch.mul(level.sub_(q), s, out=error)
            block[i + 1 :].addr_(spread[start + i, start + i + 1 : stop], error, alpha=-1)
        codes[start:stop] = rounded[: stop - start]
        w[stop:].addmm_(spread[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    if order is not None:
        codes = codes[order.argsort()]
    return AffineTensors(codes.T.contiguous(), scale_t.T, zero_t.T.round().to(torch.int32), g_idx)
