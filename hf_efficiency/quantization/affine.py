"""Affine integer grids: how scales and zero points are chosen, and how weights are rounded to them.

Shape legend: d_out, d_in features, g groups along d_in, r rows that share a scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_efficiency.quantization.formats import AffineTensors, default_g_idx, group_count

# Shrink factors of the clipping search, from the full range downwards.
_CLIP_STEPS = 16
_CLIP_FLOOR = 0.4
# Weights that a CPU searches together: so few that every pass over them stays in the cache.
_CACHED_WEIGHTS = 1 << 17
# Subnormal in float16, whose steps are 2^-24: rounding costs at most 3 %. Weights of 8 bits need scales this small.
_SMALLEST_SCALE = 2.0**-20
_LARGEST_SCALE = 65504.0


def storable_scale(scale: Tensor) -> Tensor:
    """Rounds scales to numbers that float16 and bfloat16 both hold exactly, so that every kernel sees the same."""
    return scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.bfloat16).to(torch.float16).float()


@dataclass(frozen=True)
class AffineGrid:
    """The grid w ~ s (q - z) with q in 0 .. 2^bits - 1 and an integer zero point, so that 0 is exact.

    Attributes:
        bits: Width of a code.
        group_size: Columns that share a scale; -1 for all.
        sym: Zero point fixed to the middle code.
        rows: Rows that share a scale: 1 (per channel or group), r for 2-D blocks, 0 for all (per tensor).
        clip: Search a smaller range that lowers the squared rounding error, instead of the full range.
    """

    bits: int
    group_size: int
    sym: bool = False
    rows: int = 1
    clip: bool = False

    @property
    def top(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scales and zero points (d_out, g) float32 for a weight (d_out, d_in).

        Args:
            weight: (d_out, d_in) float32.
            importance: (d_in,) weights of the squared error in the clipping search (the Hessian's diagonal, say).
        """
        tiles = self._tiles(weight)
        low = tiles.amin(-1).clamp(max=0)
        high = tiles.amax(-1).clamp(min=0)
        if self.clip:
            scale, zero = self._search(
                tiles, low, high, None if importance is None else self._spread(importance, weight)
            )
        else:
            scale, zero = self._parameters(low, high)
        return self._expand(scale, weight.shape[0]), self._expand(zero, weight.shape[0])

    def _parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.sym:
            bound = torch.maximum(-low, high)
            scale = storable_scale(2 * bound / self.top)
            return scale, torch.full_like(scale, float(1 << (self.bits - 1)))
        scale = storable_scale((high - low) / self.top)
        # Version 1 of the gptq format stores z - 1, and readers disagree on what z = 0 wraps to.
        return scale, torch.round(-low / scale).clamp(1, self.top)

    def _search(self, tiles: Tensor, low: Tensor, high: Tensor, spread: Tensor | None) -> tuple[Tensor, Tensor]:
        """The best of `_CLIP_STEPS` ranges of each tile, by the squared error that `spread` weighs."""
        bands = len(tiles)
        step = bands if tiles.device.type != "cpu" else max(1, _CACHED_WEIGHTS // tiles[0].numel())
        scales, zeros = torch.empty_like(low), torch.empty_like(low)
        buffer = torch.empty_like(tiles[:step])
        for start in range(0, bands, step):
            part = slice(start, start + step)
            weights = spread if spread is None or len(spread) == 1 else spread[part]
            found = self._search_part(tiles[part], low[part], high[part], weights, buffer[: len(tiles[part])])
            scales[part], zeros[part] = found
        return scales, zeros

    def _search_part(
        self, tiles: Tensor, low: Tensor, high: Tensor, spread: Tensor | None, error: Tensor
    ) -> tuple[Tensor, Tensor]:
        best_scale, best_zero = self._parameters(low, high)
        best = torch.full_like(best_scale, torch.inf)
        for step in range(_CLIP_STEPS):
            shrink = 1 - step * (1 - _CLIP_FLOOR) / _CLIP_STEPS
            scale, zero = self._parameters(low * shrink, high * shrink)
            # The reciprocal costs a third of a division. Where it rounds otherwise, both neighbours are as good.
            torch.mul(tiles, scale.reciprocal().unsqueeze(-1), out=error)
            error.round_().add_(zero.unsqueeze(-1)).clamp_(0, self.top).sub_(zero.unsqueeze(-1))
            error.mul_(scale.unsqueeze(-1)).sub_(tiles).square_()
            total = (error if spread is None else error.mul_(spread)).sum(-1)
            better = total < best
            best = torch.where(better, total, best)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
        return best_scale, best_zero

    def quantize(self, weight: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor | None = None) -> AffineTensors:
        """Rounds to the nearest code. weight (d_out, d_in), scales and zeros (d_out, g)."""
        if g_idx is None:
            g_idx = default_g_idx(weight.shape[1], self.group_size, weight.device)
        index = g_idx.long()
        codes = (weight / scales[:, index]).round_().add_(zeros[:, index]).clamp_(0, self.top)
        return AffineTensors(codes.to(torch.uint8), scales, zeros.to(torch.int32), g_idx)

    def _tiles(self, weight: Tensor) -> Tensor:
        """(d_out / r, g, r * group): the weights that share a scale, padded by zeros, which the grid holds exactly."""
        d_out, d_in = weight.shape
        size = d_in if self.group_size == -1 else self.group_size
        groups = group_count(d_in, self.group_size)
        rows = d_out if self.rows == 0 else self.rows
        bands = -(-d_out // rows)
        padded = torch.nn.functional.pad(weight, (0, groups * size - d_in, 0, bands * rows - d_out))
        return padded.view(bands, rows, groups, size).transpose(1, 2).reshape(bands, groups, rows * size)

    def _spread(self, importance: Tensor, weight: Tensor) -> Tensor:
        """The importance (d_in,) of each weight of a tile, (d_out / r or 1, g, r * group)."""
        return self._tiles(importance.unsqueeze(0) if self.rows == 1 else importance.expand_as(weight))

    def _expand(self, values: Tensor, d_out: int) -> Tensor:
        rows = d_out if self.rows == 0 else self.rows
        return values.repeat_interleave(rows, 0)[:d_out]
