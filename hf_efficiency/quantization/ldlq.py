"""Block LDLQ: vector quantization with linear feedback from the Hessian (QuIP#, Tseng et al. 2024, section 4.1).

With the error `E = W - Q` and `H = L D L^T` (L unit lower triangular in blocks of 8, D block diagonal) the proxy
loss `tr(E H E^T)` is the sum of `tr((E L)_k D_k (E L)_k^T)`. Block column k of `E L` is
`E_k + sum_{j > k} E_j L_jk`, so going from the last block to the first and quantizing
`W_k + sum_{j > k} E_j L_jk` leaves only the codebook's own rounding error in every term.

Shapes: r rows, n columns, b = 8 columns of a block, p columns of a panel.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["block_ldl", "damped_cholesky", "ldlq", "proxy_loss", "sweep"]

BLOCK = 8
_PANEL = 128
_RETRIES = 6

Quantizer = Callable[[Tensor], tuple[Sequence[Tensor], Tensor]]  # (m, 8) -> codes (m,) of each stage, values (m, 8)


def damped_cholesky(hessian: Tensor, damp_percent: float, name: str) -> tuple[Tensor, Tensor]:
    """Cholesky factor of a damped Hessian. Where it is not positive definite, ten times the damping is tried.

    Args:
        hessian: `(n, n)` symmetric.
        damp_percent: Part of the mean diagonal that is added to the diagonal.
        name: The layer, for messages.

    Returns:
        The lower factor `(n, n)`, and the damped Hessian `(n, n)`.

    Raises:
        ValueError: The Hessian holds NaN, or is not positive definite under any damping tried.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError(f"{name}: the Hessian holds NaN or infinity; the activations of this layer overflowed.")
    mean = hessian.diagonal().mean().clamp_min(torch.finfo(hessian.dtype).tiny)
    # Damping of exactly zero could never grow.
    step = max(damp_percent, 1e-6)
    damp = damp_percent
    for _ in range(_RETRIES):
        damped = hessian.clone()
        damped.diagonal().add_(damp * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if not info.item():
            return factor, damped
        damp = step = step * 10
    raise ValueError(
        f"{name}: the Hessian is not positive definite even with damp_percent={damp / 10:g}; "
        "calibrate on more tokens or raise damp_percent."
    )


def block_ldl(factor: Tensor) -> Tensor:
    """Unit block lower triangular `L` of `H = L D L^T` from the Cholesky factor of H, both `(n, n)`."""
    n = len(factor)
    columns = factor.view(n, n // BLOCK, BLOCK).transpose(0, 1)  # (n/b, n, b)
    corners = columns.reshape(n // BLOCK, n // BLOCK, BLOCK, BLOCK).diagonal().permute(2, 0, 1)  # (n/b, b, b)
    solved = torch.linalg.solve_triangular(corners, columns, upper=False, left=False)
    return solved.transpose(0, 1).reshape(n, n)


def ldlq(weight: Tensor, lower: Tensor, quantize: Quantizer) -> tuple[list[Tensor], Tensor]:
    """Quantize with feedback, all rows at once.

    Args:
        weight: `(r, n)`, n a multiple of 8.
        lower: `L` of `block_ldl`, `(n, n)`.
        quantize: Rounds vectors `(m, 8)` to the codebook.

    Returns:
        Codes `(r, n / 8)` of each stage, and the quantized weight `(r, n)`.
    """
    n = weight.shape[1]
    error = torch.zeros_like(weight)
    target = weight.clone()  # plus the feedback of finished panels
    blocks: list[Sequence[Tensor]] = []
    for stop in range(n, 0, -_PANEL):
        start = max(stop - _PANEL, 0)
        for k in range(stop - BLOCK, start - 1, -BLOCK):
            later = slice(k + BLOCK, stop)
            here = slice(k, k + BLOCK)
            wanted = target[:, here] + error[:, later] @ lower[later, here]
            codes, value = quantize(wanted)
            error[:, here] = weight[:, here] - value
            blocks.append(codes)
        target[:, :start] += error[:, start:stop] @ lower[start:stop, :start]
    stages = [torch.stack(stage[::-1], dim=1) for stage in zip(*blocks, strict=True)]
    return stages, weight - error


def sweep(weight: Tensor, codes: list[Tensor], quantized: Tensor, hessian: Tensor, quantize: Quantizer) -> None:
    """Improve quantized blocks one at a time, in place, given all the others: a sweep of coordinate descent.

    With the other blocks held, `tr(E H E^T)` is a quadratic around `Q_k + (E H)_k H_kk^-1`. That point is rounded
    to the codebook, and each row takes the new codeword only where it lowers its own loss.

    Args:
        weight: `(r, n)`.
        codes: `(r, n / 8)` of each stage, from `ldlq`.
        quantized: `(r, n)`, from `ldlq`.
        hessian: `(n, n)`, damped.
        quantize: Rounds vectors `(m, 8)` to the codebook.
    """
    n = weight.shape[1]
    corners = hessian.view(n // BLOCK, BLOCK, n // BLOCK, BLOCK).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    inverses = torch.linalg.inv(corners)  # (n/b, b, b)
    error = weight - quantized
    for start in range(0, n, _PANEL):
        panel = slice(start, min(start + _PANEL, n))
        gradient = error @ hessian[:, panel]  # (r, p), kept up to date inside the panel
        for k in range(panel.start, panel.stop, BLOCK):
            here, local = slice(k, k + BLOCK), slice(k - start, k - start + BLOCK)
            step = gradient[:, local] @ inverses[k // BLOCK]  # (r, b) from the present value to the optimum
            new_codes, value = quantize(quantized[:, here] + step)
            change = value - quantized[:, here]
            miss = step - change
            corner = corners[k // BLOCK]
            better = ((miss @ corner) * miss).sum(1) < ((step @ corner) * step).sum(1)
            change *= better[:, None]
            quantized[:, here] += change
            error[:, here] -= change
            gradient -= change @ hessian[here, panel]
            for stage, new in zip(codes, new_codes, strict=True):
                stage[:, k // BLOCK] = torch.where(better, new, stage[:, k // BLOCK])


def proxy_loss(error: Tensor, hessian: Tensor) -> Tensor:
    """`tr(E H E^T)` for `(r, n)` and `(n, n)`."""
    return ((error @ hessian) * error).sum()
