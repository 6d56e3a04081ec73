"""Stores a changed weight again in the format of the layer that held the old one: rounding to nearest, no data.

Where a format has room for it, the grid of the old weight competes with a fresh one, group by group or layer by layer:
weights that an adapter hardly moved still lie on the old grid, where rounding costs nothing.

Shape legend: d_out, d_in features; g groups along d_in; d_pad: d_in rounded up to a multiple of 8.
"""

import copy

import torch
from torch import Tensor, nn

from hf_efficiency.quantization.affine import AffineGrid
from hf_efficiency.quantization.e8p import CODEBOOKS, DIM
from hf_efficiency.quantization.formats import AffineTensors, group_count
from hf_efficiency.quantization.hadamard import hadamard_transform
from hf_efficiency.quantization.layers.affine import AffineLinear
from hf_efficiency.quantization.layers.base import QuantizedLinear
from hf_efficiency.quantization.layers.lattice import LatticeLinear
from hf_efficiency.quantization.layers.lut import LUTLinear
from hf_efficiency.quantization.nf4 import NF4

_SMALLEST_VECTOR = 0.1  # below it, dividing by a tuned entry of SU or SV would blow rounding errors up
# Shares of the range for which LDLQ's codebooks are scaled; without error feedback a narrower one may serve better.
_LATTICE_SHARES = (1.0, 0.9, 1.1)


@torch.no_grad()
def requantize(layer: QuantizedLinear, weight: Tensor, bias: Tensor | None = None) -> QuantizedLinear:
    """A new layer of the format of `layer` that holds `weight` as nearly as rounding to nearest can.

    Args:
        layer: An `AffineLinear`, `LUTLinear` (NF4) or `LatticeLinear`; it stays as it is.
        weight: (d_out, d_in), floating.
        bias: (d_out,) of the new layer, or None for none.

    Raises:
        ValueError: If the shapes differ, the weight is not finite, or the layer's table can only be read (FP4).
        TypeError: For a storage layer of another kind.
    """
    shape = (layer.out_features, layer.in_features)
    if tuple(weight.shape) != shape:
        raise ValueError(f"the weight has shape {tuple(weight.shape)}, the layer holds {shape}.")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds NaN or infinity, which no grid can hold.")
    target = weight.float()
    if isinstance(layer, AffineLinear):
        new: QuantizedLinear = _affine(layer, target)
    elif isinstance(layer, LUTLinear):
        new = copy.deepcopy(layer)
        method = NF4(block_size=layer.block_size, double_quant=layer.double_quant, quant_type=layer.quant_type)
        method.quantize_weight("the layer", target, new)
    elif isinstance(layer, LatticeLinear):
        new = _lattice(layer, target)
    else:
        raise TypeError(f"{type(layer).__name__} is no storage layer that can be written again.")
    new.bias = None if bias is None else nn.Parameter(bias.detach().to(layer.compute_dtype), requires_grad=False)
    new.prepare()
    return new


def _affine(layer: AffineLinear, target: Tensor) -> AffineLinear:
    """For each row and group, the old grid or a fresh one with a clipping search, whichever leaves less error."""
    old = layer.unpack()
    groups = group_count(layer.in_features, layer.group_size)
    index = old.g_idx.long()
    middle = 1 << (layer.bits - 1)
    grid = AffineGrid(layer.bits, layer.group_size, sym=bool((old.zeros == middle).all()), clip=True)
    # Permuted columns are brought together by group; the last group may be smaller.
    scales, zeros = grid.fit(target[:, index.argsort(stable=True)])
    candidates = [(old.scales.float(), old.zeros.float()), (scales, zeros)]
    errors = torch.stack([_group_errors(grid, target, *c, index, groups) for c in candidates])
    fresh = errors[1] < errors[0]  # (d_out, g)
    rounded = grid.quantize(
        target, torch.where(fresh, scales, candidates[0][0]), torch.where(fresh, zeros, candidates[0][1]), old.g_idx
    )
    new = copy.deepcopy(layer)
    new.pack(AffineTensors(rounded.codes, rounded.scales.to(old.scales.dtype), rounded.zeros, old.g_idx))
    return new


def _group_errors(
    grid: AffineGrid, target: Tensor, scales: Tensor, zeros: Tensor, index: Tensor, groups: int
) -> Tensor:
    """Squared rounding error (d_out, g) of `target` (d_out, d_in) on one grid."""
    rounded = grid.quantize(target, scales, zeros, index)
    values = (rounded.codes.float() - zeros[:, index]) * scales[:, index]
    return torch.zeros(len(target), groups, device=target.device).index_add_(1, index, (values - target).square())


def _lattice(layer: LatticeLinear, target: Tensor) -> LatticeLinear:
    """Nearest codewords of the rotated weight, at the layer's own scale or a fresh one; tuned layers also as signs."""
    su, sv = layer.vectors()
    vectors = [(su, sv)]
    if layer.tuned:
        signs = tuple(torch.where(v < 0, -1.0, 1.0) for v in (su, sv))
        tame = min(float(su.abs().min()), float(sv.abs().min())) > _SMALLEST_VECTOR
        vectors = [*(vectors if tame else []), (signs[0], signs[1])]
    best: tuple[float, LatticeLinear] | None = None
    for su, sv in vectors:
        padded = torch.nn.functional.pad(target / su[:, None] / sv, (0, -layer.in_features % DIM))
        rotated = hadamard_transform(hadamard_transform(padded), dim=0)  # (d_out, d_pad)
        fresh = rotated.square().mean().sqrt() / CODEBOOKS[layer.bits].scale
        for scale in [layer.scale, *(fresh / share for share in _LATTICE_SHARES)]:
            new = _encode(layer, rotated, scale.clamp_min(torch.finfo(torch.float32).tiny))
            if layer.tuned:
                new.su.copy_(su)
                new.sv.copy_(sv)
            error = _distance(new, target)
            if best is None or error < best[0]:
                best = (error, new)
    if best is None:
        raise ValueError("no vectors to try")
    return best[1]


def _encode(layer: LatticeLinear, rotated: Tensor, scale: Tensor) -> LatticeLinear:
    """A copy of `layer` with the nearest codes of `rotated` (d_out, d_pad), and the scale that then fits best."""
    codebook = CODEBOOKS[layer.bits]
    codes, values = codebook.quantize((rotated / scale).view(-1, DIM))
    power = values.square().sum()
    fit = (values * rotated.view(-1, DIM)).sum() / power
    new = copy.deepcopy(layer)
    for stored, stage in zip(new.stages(), codes, strict=True):
        stored.copy_(stage.view(stored.shape))
    new.scale.copy_(torch.where(power > 0, fit, scale))
    return new


def _distance(layer: QuantizedLinear, target: Tensor) -> float:
    """Squared error of what `layer` holds."""
    return float((exact_weight(layer) - target).square().sum())


def exact_weight(layer: QuantizedLinear) -> Tensor:
    """The weight (d_out, d_in) that a storage layer stands for, in float32 whatever its `compute_dtype`."""
    dtype = layer.compute_dtype
    layer.compute_dtype = torch.float32
    try:
        return layer.dequantize()
    finally:
        layer.compute_dtype = dtype
