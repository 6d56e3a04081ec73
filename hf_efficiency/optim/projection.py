"""Subspaces of a gradient: how they are found, compared and stored.

Shape legend: a gradient (m, n) stands here so that the projection is on its left, G (d, n); P (d, r) has orthonormal
columns, but for random ones.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_OVERSAMPLING = 8  # columns more than asked for, as Halko et al. advise
_POWER_STEPS = 2  # of the randomized SVD
_BLOCK = 256  # codes of a quantized projection that share a scale and a minimum


def svd_basis(gradient: Tensor, rank: int) -> Tensor:
    """The first `rank` left singular vectors (GaLore, Algorithm 2), (d, r). A copy: the whole factor is let go."""
    d, n = gradient.shape
    if d < n:  # of a tall matrix it is faster
        _, _, right = torch.linalg.svd(gradient.T, full_matrices=False)
        return right[:rank].T.clone(memory_format=torch.contiguous_format)
    left, _, _ = torch.linalg.svd(gradient, full_matrices=False)
    return left[:, :rank].clone(memory_format=torch.contiguous_format)


def randomized_basis(gradient: Tensor, rank: int, seed: int) -> Tensor:
    """About the first `rank` left singular vectors, (d, r), in their order (Halko et al. 2011, Algorithms 4.4, 5.1)."""
    d, n = gradient.shape
    columns = min(rank + _OVERSAMPLING, d, n)
    basis = torch.linalg.qr(gradient @ gaussian((n, columns), seed, gradient)).Q
    for _ in range(_POWER_STEPS):
        basis = power_step(gradient, basis)
    # the singular vectors inside the basis: those of a small matrix
    small = basis.T @ gradient
    _, vectors = torch.linalg.eigh(small @ small.T)
    return basis @ vectors.flip(1)[:, :rank]


def power_step(gradient: Tensor, basis: Tensor) -> Tensor:
    """One step of orthogonal iteration, qr(G Gᵀ P), (d, r).

    Column by column the signs follow the old basis, so that a moment's coordinate keeps its meaning.
    """
    q, upper = torch.linalg.qr(gradient @ (gradient.T @ basis))
    return q * torch.where(upper.diagonal() < 0, -1.0, 1.0).to(q.dtype)


def random_basis(shape: tuple[int, int], seed: int, like: Tensor) -> Tensor:
    """Gaussian numbers of variance 1 / r (APOLLO, section 4.2), (d, r), the same for the same seed and device."""
    return gaussian(shape, seed, like) * shape[1] ** -0.5


def gaussian(shape: tuple[int, int], seed: int, like: Tensor) -> Tensor:
    """Standard normal numbers on the device of `like` and in its dtype, drawn in float32."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=like.device).to(like.dtype)


# How a basis is found from nothing: (gradient, rank, seed) -> (d, r).
FIRST_BASIS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "svd": lambda gradient, rank, seed: svd_basis(gradient, rank),
    "randomized": randomized_basis,
    "power": randomized_basis,
}


def similarity(basis: Tensor, other: Tensor) -> float:
    """Mean squared cosine of the principal angles of two subspaces, ||Pᵀ Q||² / r: 1 for the same, r / d by chance."""
    return (basis.T @ other).square().sum().item() / basis.shape[1]


def quantize_projection(basis: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integer codes, asymmetric, in blocks of 256 elements (Q-GaLore, section 3.2).

    Args:
        basis: (d, r).
        bits: 8, or 4: two codes a byte.

    Returns:
        uint8 (ceil(d r bits / 8),), and float32 scales and minima (ceil(d r / 256),).
    """
    flat = basis.float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    low, high = blocks.amin(1), blocks.amax(1)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-30)
    codes = ((blocks - low[:, None]) / scale[:, None]).round_().to(torch.uint8).view(-1)[: len(flat)].clone()
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, len(codes) % 2))
        codes = codes[::2] | codes[1::2] << 4
    return codes, scale, low


def dequantize_projection(codes: Tensor, scale: Tensor, low: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """float32 (d, r) from what `quantize_projection` returns."""
    count = shape[0] * shape[1]
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=1).view(-1)[:count]
    blocks = torch.nn.functional.pad(codes, (0, -count % _BLOCK)).view(-1, _BLOCK).float()
    return blocks.mul_(scale[:, None]).add_(low[:, None]).view(-1)[:count].view(shape)


def projection_bytes(count: int, bits: int | None, element_size: int) -> int:
    """Bytes of a stored projection of `count` elements."""
    return count * element_size if bits is None else -(-count * bits // 8) + 8 * -(-count // _BLOCK)
