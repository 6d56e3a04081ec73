"""AWQ: input channels that matter are scaled up before rounding, and the scale is undone in the operation before.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (MLSys 2024), equations 4
and 5. Before a block is compressed, the covariance C of each input is gathered in one pass of the dense block. The
output error of a candidate is then tr(dW C dWᵀ): the mean squared error for which the paper runs the layer each time.
Shape legend: d_out, d_in features, n channels of the operation before, g groups, k columns of a group.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_efficiency.calibration.method import BlockContext, InputGroup
from hf_efficiency.calibration.statistics import InputStatistics
from hf_efficiency.calibration.structure import linear_sizes, weight_of
from hf_efficiency.quantization.affine import AffineGrid
from hf_efficiency.quantization.folding import Fold, find_folds
from hf_efficiency.quantization.formats import LAYOUTS, default_g_idx
from hf_efficiency.quantization.layers.affine import AffineLinear
from hf_efficiency.quantization.layers.base import QuantizedLinear
from hf_efficiency.quantization.scheme import AffineMethod

AUTO = "auto"

# A scale per channel needs fewer tokens than a Hessian, and a sample of the rows ranks the candidates like all of them.
_SEARCH_TOKENS = 4096
_SEARCH_WEIGHTS = 1 << 18
# Silent channels count as this share of the average, so that no scale runs away.
_SILENT = 1e-3
_WEIGHT_POWERS = (0.25, 0.5, 0.75)

# Shrink factors of the range, then steps of its lower and of its upper end, then smaller steps.
_SHRINK = tuple(1 - 0.045 * i for i in range(12))
_ENDS = ((-0.15, -0.1, -0.05, 0.05, 0.1, 0.15), (-0.06, -0.03, 0.03, 0.06))
# Keeps groups apart from directions that the calibration data never showed; relative to each channel's energy.
_DAMP = 0.01
# Wider groups weigh their errors by the diagonal alone.
_WIDEST = 256


@dataclass(kw_only=True)
class AWQ(AffineMethod):
    """Activation-aware scaling and clipping, then rounding to the nearest code.

    Attributes:
        format: `"auto"` is `"awq"` where that layout can hold the model (4 bits everywhere, whole groups) and
            `"gptq"` elsewhere; or a layout's name.
        n_grid: Steps of the search of alpha between 0 and 1.
        duo_scaling: Also try scales that fall with the size of a channel's weights.
        clip: Search the range of each group for the smallest output error.
        true_sequential: Layers inside a block see inputs that passed through the quantized layers before them.

    A group of layers whose scale can't be undone (`folding.py`) keeps its channels as they are.
    """

    calibrated: ClassVar[bool] = True
    statistics: ClassVar[frozenset[str]] = frozenset({"hessian"})

    format: str = AUTO
    n_grid: int = 20
    duo_scaling: bool = True
    clip: bool = True
    true_sequential: bool = True

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """ValueError for values out of range. Settles `format="auto"` as far as is possible without a model."""
        if self.format == AUTO:
            widths = {self.bits, *(o.get("bits", self.bits) for o in (self.dynamic or {}).values())}
            self.format = "awq" if widths == {4} else "gptq"
            # An instance attribute, no field: it is no part of what a checkpoint records.
            self._may_change_format = self.format == "awq"
        super().validate()
        if isinstance(self.n_grid, bool) or not isinstance(self.n_grid, int) or self.n_grid < 1:
            raise ValueError(f"n_grid={self.n_grid!r} must be a whole number of at least 1 (20 is usual).")

    def empty_layer(self, name: str, in_features: int, out_features: int, **kwargs: Any) -> QuantizedLinear:
        """An `AffineLinear`. ValueError names the layer where a format that was asked for can't hold it."""
        self._settle_format(name, in_features, out_features)
        return super().empty_layer(name, in_features, out_features, **kwargs)

    def _settle_format(self, name: str, in_features: int, out_features: int) -> None:
        """Falls back to the gptq layout where nobody chose awq, nothing is stored yet, and awq can't hold a layer."""
        if not getattr(self, "_may_change_format", False):
            return
        bits, group_size, _ = self.scheme(name)
        try:
            LAYOUTS["awq"].check(in_features, out_features, bits, group_size)
        except ValueError:
            self.format, self._may_change_format = "gptq", False

    def start_block(self, ctx: BlockContext) -> None:
        """Searches the scales of every group whose scale can be undone, and folds them into the dense block."""
        for name, linear in ctx.linears.items():
            self._settle_format(name, *linear_sizes(linear))
        self._may_change_format = False
        self._scale(ctx)
        super().start_block(ctx)

    def __getstate__(self) -> dict[str, Any]:
        """What copies take along: not what was found out about the blocks of one model."""
        return {name: value for name, value in self.__dict__.items() if name != "_folds"}

    def _scale(self, ctx: BlockContext) -> None:
        known: dict[tuple[Any, ...], list[Fold]] = self.__dict__.setdefault("_folds", {})
        if ctx.index == 0:
            known.clear()
        found = find_folds(ctx, known)
        folds = [f for f in found if any(f"{ctx.name}.{name}" in ctx.linears for name in f.readers)]
        # All searches see the dense block. Folding one group scales whole rows of another's layers, which moves none of
        # that group's rounding errors.
        scales = []
        for fold, statistics in zip(folds, _observe(ctx, folds), strict=True):
            compressed = [name for name in fold.readers if f"{ctx.name}.{name}" in ctx.linears]
            weights = [weight_of(ctx.block.get_submodule(name)).float() for name in compressed]
            grids = [self.grid(f"{ctx.name}.{name}") for name in compressed]
            scales.append(search_scale(weights, grids, statistics.hessian(), fold, self.n_grid, self.duo_scaling))
        for fold, scale in zip(folds, scales, strict=True):
            fold.apply_(ctx.block, scale)

    def compress_group(self, group: InputGroup) -> None:
        """Rounds every member, whose channels are scaled already."""
        for name, weight in zip(group.names, group.weights(), strict=True):
            layer = group.new_layer(self, name)
            if not isinstance(layer, AffineLinear):
                raise TypeError(f"{name}: AWQ stores into AffineLinear, got {type(layer).__name__}.")
            grid = self.grid(name)
            fitted = fit_clipped(weight, group.hessian, grid) if self.clip else grid.fit(weight)
            layer.pack(grid.quantize(weight, *fitted))
            group.store(name, layer)


def _observe(ctx: BlockContext, folds: list[Fold]) -> list[InputStatistics]:
    """The covariance of each fold's tensor in the dense block, over an even sample of the micro-batches."""
    tokens = ctx.inputs[0].shape[0] * ctx.inputs[0].shape[1]
    stride = max(1, len(ctx.inputs) * tokens // _SEARCH_TOKENS)
    device = next(ctx.block.parameters()).device
    dtype = ctx.statistics_dtype
    statistics = [InputStatistics(len(fold.index), frozenset({"hessian"}), device, dtype) for fold in folds]

    def hook(statistic: InputStatistics) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: statistic.add(args[0])

    with ExitStack() as stack:
        for fold, statistic in zip(folds, statistics, strict=True):
            reader = ctx.block.get_submodule(fold.readers[0])
            stack.callback(reader.register_forward_pre_hook(hook(statistic)).remove)
        for i in range(0, len(ctx.inputs), stride) if folds else ():
            ctx.run(ctx.inputs[i], i)
    return statistics


def search_scale(
    weights: Sequence[Tensor],
    grids: Sequence[AffineGrid],
    covariance: Tensor,
    fold: Fold,
    n_grid: int = 20,
    duo_scaling: bool = True,
) -> Tensor:
    """The scale (n,) of the producer's channels that lowers the readers' output error most.

    s = x^alpha / w^beta with x the root mean square of a channel and w the mean size of its weights. (The paper's mean
    |x| with beta = 0 does a little worse: on SmolLM2's down projections 1 to 6 % more error.)

    Args:
        weights: The readers, each (d_out, d_in) float32.
        grids: The grid of each.
        covariance: Mean of x xᵀ, (d_in, d_in).
        fold: Tells which input channels share a scale.
        n_grid: Values of alpha.
        duo_scaling: Whether beta is searched, too.
    """
    index = fold.index.to(covariance.device)
    shared = torch.zeros(fold.channels, device=index.device).index_add_(0, index, torch.ones_like(covariance[0]))
    used = shared > 0

    def pooled(values: Tensor) -> Tensor:
        mean = torch.zeros_like(shared).index_add_(0, index, values) / shared.clamp(min=1)
        return mean.clamp(min=_SILENT * mean[used].mean()).clamp(min=torch.finfo(mean.dtype).tiny)

    size = pooled(covariance.diagonal()).sqrt()
    weight_size = pooled(torch.cat(list(weights)).abs().mean(0))
    stride = max(1, sum(w.numel() for w in weights) // _SEARCH_WEIGHTS)
    samples = [w[::stride] for w in weights]

    def scale(alpha: float, beta: float) -> Tensor:
        s = size**alpha / weight_size**beta
        return torch.where(used, s / (s[used].max() * s[used].min()).sqrt(), 1.0)

    def loss(alpha: float, beta: float) -> float:
        s = scale(alpha, beta)[index]
        total = 0.0
        for weight, grid in zip(samples, grids, strict=True):
            error = _rounded(weight * s, grid).div_(s).sub_(weight)
            total += float((error @ covariance).mul_(error).sum())
        return total

    best, alpha = min((loss(i / n_grid, 0.0), i / n_grid) for i in range(n_grid))
    beta = 0.0
    for b in _WEIGHT_POWERS if duo_scaling else ():
        for a in {alpha, max(0.0, alpha - 0.1)}:
            if (candidate := loss(a, b)) < best:
                best, alpha, beta = candidate, a, b
    return scale(alpha, beta)


def _rounded(weight: Tensor, grid: AffineGrid) -> Tensor:
    """The weight (d_out, d_in) after rounding with full ranges."""
    index = default_g_idx(weight.shape[1], grid.group_size, weight.device).long()
    scales, zeros = grid.fit(weight)
    return _round_trip(weight, scales[:, index], zeros[:, index], grid.top)


def _round_trip(weight: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    return (weight / scale).round_().add_(zero).clamp_(0, top).sub_(zero).mul_(scale)


def fit_clipped(weight: Tensor, covariance: Tensor, grid: AffineGrid) -> tuple[Tensor, Tensor]:
    """Scales and zero points (d_out, g) whose rounding errors move the output least, group by group.

    The range of each group shrinks as a whole; then (unless symmetric) its ends move one by one. The error of a group
    is e C_gg eᵀ with the covariance of its columns.

    Args:
        weight: (d_out, d_in) float32.
        covariance: Mean of x xᵀ, (d_in, d_in).
        grid: Bits, grouping and symmetry.
    """
    columns = weight.shape[1] if grid.group_size == -1 else grid.group_size
    fitted = []
    for start in range(0, weight.shape[1], columns):
        part = slice(start, min(start + columns, weight.shape[1]))
        fitted.append(_fit_group(weight[:, part].contiguous(), covariance[part, part], grid))
    return torch.cat([s for s, _ in fitted], dim=1), torch.cat([z for _, z in fitted], dim=1)


def _fit_group(w: Tensor, covariance: Tensor, grid: AffineGrid) -> tuple[Tensor, Tensor]:
    """Scale and zero point (d_out, 1) of one group (d_out, k)."""
    bounds = AffineGrid(grid.bits, -1, grid.sym)
    energy = covariance.diagonal()
    metric = covariance + torch.diag(_DAMP * energy) if len(energy) <= _WIDEST else None
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    ends = torch.ones(2, len(w), device=w.device)  # what of low and of high is kept
    best = torch.full_like(low, torch.inf)
    fitted = bounds.fit(torch.stack([low, high], dim=1))

    def attempt(candidate: Tensor) -> None:
        nonlocal best, ends, fitted
        scale, zero = bounds.fit(torch.stack([low * candidate[0], high * candidate[1]], dim=1))
        error = _round_trip(w, scale, zero, grid.top).sub_(w)
        moved = error * energy if metric is None else error @ metric
        loss = moved.mul_(error).sum(1)
        better = loss < best
        best = torch.where(better, loss, best)
        ends = torch.where(better, candidate, ends)
        column = better.unsqueeze(1)
        fitted = torch.where(column, scale, fitted[0]), torch.where(column, zero, fitted[1])

    for shrink in _SHRINK:
        attempt(torch.full_like(ends, shrink))
    for steps in () if grid.sym else _ENDS:
        for end in (0, 1):
            start = ends.clone()
            for step in steps:
                candidate = start.clone()
                candidate[end] += step
                attempt(candidate)
    return fitted
