"""Moving keys or queries that carry a rotary position (Su et al. 2021) to another position."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """A model's rotary embedding.

    Rotations add up, so that a key rotated for position p and then by s is the key at position p + s.

    Attributes:
        frequencies: (r / 2,) angle of one position; the first r of a head's numbers are rotated.
        interleaved: Whether neighbours (2i, 2i + 1) are rotated together, or (i, i + r / 2).
    """

    frequencies: Tensor
    interleaved: bool = False

    def shift(self, x: Tensor, by: Tensor) -> Tensor:
        """x moved by so many positions.

        Args:
            x: (b, heads, t, d).
            by: (b, t) or (b, 1), integers of any sign.
        """
        # float64: at position 20,000 the angles of float32 would be off by 0.002.
        angles = by.to(x.device).double().unsqueeze(-1) * self.frequencies.to(x.device).double()
        cos, sin = angles.cos().unsqueeze(1).float(), angles.sin().unsqueeze(1).float()
        r = 2 * self.frequencies.shape[0]
        turned, rest = x[..., :r].float(), x[..., r:]
        if self.interleaved:
            first, second = turned[..., 0::2], turned[..., 1::2]
            out = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
        else:
            first, second = turned.chunk(2, -1)
            out = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        return torch.cat((out.to(x.dtype), rest), -1)
