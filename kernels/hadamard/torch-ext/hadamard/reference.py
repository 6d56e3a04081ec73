"""Plain torch: the truth in tests, and what runs without a kernel.

Shape legend: r rows, n length of the transform, n_in of the input, n_out of the output, m order of the base.
"""

import math

import torch
from torch import Tensor


def hadamard(
    x: Tensor,
    base: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    scale: float,
    transpose: bool,
    length: int,
    out_length: int,
) -> Tensor:
    """after * (H (before * x)) * scale in float32, rounded once: x (r, n_in) to (r, n_out)."""
    y = x.float() if before is None else x.float() * before
    y = torch.nn.functional.pad(y, (0, length - x.shape[1]))
    order = 1
    if base is not None:
        order = len(base)
        matrix = base.float()
        y = (y.reshape(-1, order) @ (matrix if transpose else matrix.T)).reshape(-1, length)
    while order < length:  # one doubling of Sylvester's at a time
        pair = y.reshape(-1, 2, order)
        y = torch.stack([pair[:, 0] + pair[:, 1], pair[:, 0] - pair[:, 1]], 1)
        order *= 2
    y = y.reshape(-1, length)[:, :out_length] * (scale / math.sqrt(length))
    return (y if after is None else y * after).to(x.dtype)
