"""The Triton code. Imported on the first launch only.

Shape legend: n rows (tokens), c rows of a chunk, V vocabulary, W width of a buffer (V and some padding).

Bounded by memory: a program takes a row of V logits of student and teacher, and reads both twice (forward and reverse
KL) or three times (JSD) and writes the gradient over the student's: 10 or 14 bytes for each entry of bfloat16, 4 or 8
without gradient. Beside it the matrix products of the same chunk do 4 d_s + 2 d_t operations or more an entry, which on
an H100 take 4 to 10 times as long. Programs are as many as rows; where these are fewer than multiprocessors, reading
the heads takes far longer than this kernel.

There is one configuration: the loop over V is the same for all shapes, and the matrix products beside it
hide what another block could gain.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant
from .chunked import Result, Settings, sweep

# 16 warps that each load 16 bytes of half precision a lane. Two or three such programs fill a multiprocessor: enough
# loads in flight, and few enough rows that an H100's L2 cache holds most of them for the second pass at V = 32k.
_BLOCK = 4096
_WARPS = 16
_KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


@triton.jit
def _logits(ptr, bias_ptr, column, width, vocab):
    """A block of a row in float32, -inf from V on. Loads go to the buffer's width, so that they are wide."""
    x = tl.load(ptr + column, column < width, 0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, column < vocab, 0.0).to(tl.float32)
    return tl.where(column < vocab, x, float("-inf"))


@triton.jit
def _online(x, top, scale):
    """For each group of lanes: the new maximum, and what the old sums and each x count relative to it."""
    risen = tl.maximum(tl.max(x, 1), top)
    return risen, tl.exp2((top - risen) * scale), tl.exp2((x - risen[:, None]) * scale)


@triton.jit
def _log2_ratio(a, log_a, log_b):
    """a log2(a / b), 0 where a is."""
    return tl.where(a > 0, a * (log_a - log_b), 0.0)


@triton.jit
def _log2_mixture(log_p, log_q, beta):
    """log2 of beta p + (1 - beta) q."""
    x, y = log_p + tl.log2(beta), log_q + tl.log2(1 - beta)
    return tl.maximum(x, y) + tl.log2(1 + tl.exp2(-tl.abs(x - y)))


@triton.jit
def _divergence(
    s_ptr, t_ptr, loss_ptr, weight_ptr, s_bias_ptr, t_bias_ptr, vocab, s_width, t_width, s_stride, t_stride, scale,
    beta, KIND: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # scale: log2(e) / temperature. All exponentials are of base 2. Differences are taken between raw logits, which is
    # exact where it matters, and scaled after.
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * s_stride
    t_ptr += row * t_stride
    # Statistics are kept for groups of 8 lanes, which one thread loads at once: the loops exchange nothing.
    GROUPS: tl.constexpr = BLOCK // 8
    lane = tl.arange(0, GROUPS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    weight = tl.load(weight_ptr + row)
    if weight == 0:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, vocab, BLOCK):
                tl.store(s_ptr + start + lane, tl.zeros((GROUPS, 8), s_ptr.dtype.element_ty), start + lane < s_width)
    else:
        s_top = tl.full((GROUPS,), -3.0e38, tl.float32)
        t_top = tl.full((GROUPS,), -3.0e38, tl.float32)
        s_sum = tl.zeros((GROUPS,), tl.float32)
        t_sum = tl.zeros((GROUPS,), tl.float32)
        gain = tl.zeros((GROUPS,), tl.float32)  # of the KL's first distribution: sum of weight times difference
        for start in range(0, vocab, BLOCK):
            s = _logits(s_ptr, s_bias_ptr, start + lane, s_width, vocab)
            t = _logits(t_ptr, t_bias_ptr, start + lane, t_width, vocab)
            s_top, s_old, s_new = _online(s, s_top, scale)
            t_top, t_old, t_new = _online(t, t_top, scale)
            s_sum = s_sum * s_old + tl.sum(s_new, 1)
            t_sum = t_sum * t_old + tl.sum(t_new, 1)
            if KIND == 0:
                gain = gain * t_old + tl.sum(tl.where(t_new > 0, t_new * (t - s), 0.0), 1)
            if KIND == 1:
                gain = gain * s_old + tl.sum(tl.where(s_new > 0, s_new * (s - t), 0.0), 1)
        s_max, t_max = tl.max(s_top, 0), tl.max(t_top, 0)
        s_part, t_part = tl.exp2((s_top - s_max) * scale), tl.exp2((t_top - t_max) * scale)
        s_total, t_total = tl.sum(s_sum * s_part, 0), tl.sum(t_sum * t_part, 0)
        s_log, t_log = tl.log2(s_total), tl.log2(t_total)
        mean = 0.0  # under q, of what the gradient centres: raw differences (reverse KL), log2(q / m) (JSD)
        if KIND == 0:
            loss = (tl.sum(gain * t_part, 0) / t_total - (t_max - s_max)) * scale - (t_log - s_log)
        if KIND == 1:
            mean = tl.sum(gain * s_part, 0) / s_total
            loss = (mean - (s_max - t_max)) * scale - (s_log - t_log)
        if KIND == 2:
            s_gain = tl.zeros((GROUPS,), tl.float32)
            t_gain = tl.zeros((GROUPS,), tl.float32)
            for start in range(0, vocab, BLOCK):
                log_q = (_logits(s_ptr, s_bias_ptr, start + lane, s_width, vocab) - s_max) * scale - s_log
                log_p = (_logits(t_ptr, t_bias_ptr, start + lane, t_width, vocab) - t_max) * scale - t_log
                log_m = _log2_mixture(log_p, log_q, beta)
                s_gain += tl.sum(_log2_ratio(tl.exp2(log_q), log_q, log_m), 1)
                t_gain += tl.sum(_log2_ratio(tl.exp2(log_p), log_p, log_m), 1)
            mean = tl.sum(s_gain, 0)
            loss = beta * tl.sum(t_gain, 0) + (1 - beta) * mean
        ln2 = 0.6931471805599453
        tl.store(loss_ptr + row, loss * ln2 * weight)
        if GRADIENT:
            rate = weight * scale * ln2  # weight / temperature
            if KIND == 1:
                rate *= scale * ln2
            if KIND == 2:
                rate *= ln2 * (1 - beta)
            for start in range(0, vocab, BLOCK):
                column = start + lane
                s = _logits(s_ptr, s_bias_ptr, column, s_width, vocab)
                t = _logits(t_ptr, t_bias_ptr, column, t_width, vocab)
                log_q = (s - s_max) * scale - s_log
                log_p = (t - t_max) * scale - t_log
                q = tl.exp2(log_q)
                if KIND == 0:
                    grad = q - tl.exp2(log_p)
                if KIND == 1:
                    # log(q / p) - KL, from which the logarithms of both sums cancel.
                    grad = tl.where(q > 0, q * (s - t - mean), 0.0)
                if KIND == 2:
                    grad = tl.where(q > 0, q * (log_q - _log2_mixture(log_p, log_q, beta) - mean), 0.0)
                # The padding is the buffer's own: stores may go there, and are as wide as loads.
                tl.store(s_ptr + column, (grad * rate).to(s_ptr.dtype.element_ty), column < s_width)


def divergence_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    settings: Settings,
) -> Tensor:
    """As in `reference.py`. The padding of `student_logits` is overwritten as well."""
    losses = torch.empty_like(weights)
    if teacher_logits.stride(1) != 1:
        teacher_logits = teacher_logits.contiguous()
    biases = (None if bias is None else bias.contiguous() for bias in (student_bias, teacher_bias))
    _divergence[(len(weights),)](
        student_logits, teacher_logits, losses, weights, *biases, settings.vocab, student_logits.shape[1],
        teacher_logits.shape[1], student_logits.stride(0), teacher_logits.stride(0),
        1.4426950408889634 / settings.temperature, settings.beta, _KINDS[settings.divergence], settings.gradient,
        _BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return losses


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
    """As in `reference.py`."""
    settings = Settings(divergence, beta, temperature, vocab, any(needs))
    return sweep(
        divergence_, student_hidden, student_head, teacher, teacher_head, weights, student_bias, teacher_bias,
        settings, chunk_rows, needs,
    )  # fmt: skip


def variants() -> list[Variant]:
    """Every kind of compilation that a launch asks for; bfloat16 for all divergences."""

    def variant(dtype: str, kind: str, gradient: bool = True, bias: bool = False, odd: bool = False) -> Variant:
        signature = {"s_ptr": f"*{dtype}", "t_ptr": f"*{dtype}", "loss_ptr": "*fp32", "weight_ptr": "*fp32"}
        constexprs: dict[str, Any] = {"KIND": _KINDS[kind], "GRADIENT": gradient, "BLOCK": _BLOCK}
        if bias:
            signature |= {"s_bias_ptr": f"*{dtype}", "t_bias_ptr": f"*{dtype}"}
        else:
            constexprs |= {"s_bias_ptr": None, "t_bias_ptr": None}
        signature |= dict.fromkeys(("vocab", "s_width", "t_width", "s_stride", "t_stride"), "i32")
        unaligned = {"vocab", "t_ptr", "t_width", "t_stride"} if odd else {"vocab"}
        divisible = [name for name in signature if name not in unaligned]
        signature |= {"scale": "fp32", "beta": "fp32"}
        label = f"{kind} {dtype}{' gradient' * gradient}{' bias' * bias}{' odd' * odd}"
        return Variant(label, _divergence, signature, constexprs, _WARPS, bandwidth_bound=True, divisible=divisible)

    made = [variant("bf16", kind, gradient) for kind in _KINDS for gradient in (False, True)]
    made += [variant("bf16", kind, bias=True) for kind in ("forward_kl", "jsd")]
    made += [variant("fp16", "forward_kl"), variant("fp32", "jsd"), variant("fp32", "reverse_kl")]
    # The teacher's logits as given, with a vocabulary of odd size.
    made.append(variant("bf16", "jsd", odd=True))
    return made
