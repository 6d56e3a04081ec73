"""Plain torch: the truth in tests, and what runs without a kernel.

Shape legend: n rows (tokens), c rows of a chunk, V vocabulary, W width of a buffer (V and some padding), d_s and d_t
features of student and teacher.

Mathematics. z and y are the logits of student and teacher, T the temperature, q = softmax(z / T), p = softmax(y / T).
For any divergence D, the softmax gives dD/dz_j = q_j (g_j - sum_k q_k g_k) / T with g = dD/dq. Then:

- forward KL, KL(p ‖ q) = sum p log(p / q): g = -p / q, so dD/dz = (q - p) / T.
- reverse KL, KL(q ‖ p) = sum q log(q / p): g = log(q / p) + 1, so dD/dz = q (log(q / p) - D) / T.
- JSD, beta KL(p ‖ m) + (1 - beta) KL(q ‖ m) with m = beta p + (1 - beta) q (Agarwal et al. 2024, GKD, section 2):
  g = -beta (1 - beta) p / m + (1 - beta) (log(q / m) + 1 - (1 - beta) q / m). As beta p + (1 - beta) q = m, all but the
  logarithm cancels: g = (1 - beta) log(q / m), so dD/dz = (1 - beta) q (log(q / m) - KL(q ‖ m)) / T.
"""

import math

import torch
from torch import Tensor

from .chunked import Result, Settings, sweep


def divergence_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    settings: Settings,
) -> Tensor:
    """Weighted divergences (c,) of a chunk; the gradient of their sum overwrites the student's logits, if asked for.

    Args:
        student_logits: (c, W), without bias. Columns from V on hold anything.
        teacher_logits: (c, W or more), the same.
        weights: (c,). Rows of weight 0 may hold anything.
        student_bias: (V or more,).
        teacher_bias: (V or more,).
        settings: Of the divergence.
    """
    kind, beta, temperature, vocab, gradient = settings
    log_q = _log_softmax(student_logits[:, :vocab], student_bias, temperature)
    log_p = _log_softmax(teacher_logits[:, :vocab], teacher_bias, temperature)
    if kind == "forward_kl":
        losses = _kl(log_p, log_q)
        grad = log_q.exp() - log_p.exp() if gradient else None
    elif kind == "reverse_kl":
        losses = _kl(log_q, log_p)
        grad = _centred(log_q, log_p, losses) if gradient else None
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        of_student = _kl(log_q, log_m)
        losses = beta * _kl(log_p, log_m) + (1 - beta) * of_student
        grad = (1 - beta) * _centred(log_q, log_m, of_student) if gradient else None
    skipped = weights.eq(0)
    if grad is not None:
        grad = (grad * (weights / temperature)[:, None]).masked_fill(skipped[:, None], 0)
        student_logits[:, :vocab] = grad
    return (losses * weights).masked_fill(skipped, 0)


def _log_softmax(logits: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """(c, V), at least in float32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        wide = wide + bias[: logits.shape[1]]
    return torch.log_softmax(wide / temperature, -1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a ‖ b) of the rows. Entries with a = 0 count nothing, even where b = 0."""
    a = log_a.exp()
    return torch.where(a > 0, a * (log_a - log_b), 0).sum(-1)


def _centred(log_q: Tensor, log_b: Tensor, mean: Tensor) -> Tensor:
    """q (log(q / b) - mean), with `mean` (c,) the expectation of that logarithm under q."""
    q = log_q.exp()
    return torch.where(q > 0, q * (log_q - log_b - mean[:, None]), 0)


def divergences(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor | None,
    weights: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    vocab: int,
    chunk_rows: int,
    needs: list[bool],
) -> Result:
    """Weighted losses (n,) and the gradients of their sum, those that `needs` asks for. Arguments as of `sweep`."""
    settings = Settings(divergence, beta, temperature, vocab, any(needs))
    return sweep(
        divergence_, student_hidden, student_head, teacher, teacher_head, weights, student_bias, teacher_bias,
        settings, chunk_rows, needs,
    )  # fmt: skip
