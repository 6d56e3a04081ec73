"""The operators: checked arguments, meta implementations, gradients.

Shape legend: n rows (tokens, with any batch dimensions), V vocabulary, d_s and d_t features of student and teacher.
"""

from typing import Any

import torch
from torch import Tensor

from ._launch import namespace, run
from .check import check

_NAMESPACE = namespace(__package__)


def distill_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    reduction: str = "mean",
    vocab_size: int | None = None,
    recompute: bool = False,
    chunk_rows: int | None = None,
) -> Tensor:
    """Divergence of a student's next-token distribution q from a teacher's p, in chunks that never hold (n, V) logits.

    p and q are the softmax of hidden states times head, divided by the temperature. Logits are rounded to the dtype of
    the hidden states, as a model's are; all else is computed in float32. Student's hidden states, head and bias get
    gradients; teacher and weights get none, and there are no second derivatives.

    Args:
        student_hidden: (..., d_s) float16, bfloat16 or float32.
        student_head: (V, d_s), of the same dtype.
        teacher_hidden: (..., d_t), with the batch dimensions of the student's, of any of these dtypes.
        teacher_head: (V, d_t), of the dtype of teacher_hidden.
        divergence: `"forward_kl"`: KL(p ‖ q). `"reverse_kl"`: KL(q ‖ p). `"jsd"`: the generalised Jensen-Shannon
            divergence beta KL(p ‖ m) + (1 - beta) KL(q ‖ m), m = beta p + (1 - beta) q, of GKD (Agarwal et al. 2024,
            section 2), which tends to beta KL(p ‖ q) for small beta, and to (1 - beta) KL(q ‖ p) for beta near 1.
        beta: Of `"jsd"`, between 0 and 1, these excluded: it is 0 there. Elsewhere unused.
        temperature: Above 0. The loss is not multiplied by its square (Hinton et al. 2015, section 2.1): the caller
            does that who wants gradients of like size at all temperatures.
        weights: (...), a mask or a factor for each row, 0 or more. Rows of weight 0 contribute nothing, whatever they
            hold, but are multiplied by the heads like others: where they are many, select the rest before. All 1 if
            None.
        student_bias: (V,), added to the student's logits.
        teacher_bias: (V,), added to the teacher's.
        reduction: `"sum"` of weights times divergences; `"mean"`: that by the sum of weights, 0 where this is 0;
            `"none"`: weights times divergences.
        vocab_size: Rows of the heads that count, from the first on: for heads padded to different sizes. If None, both
            must have the same size, and all count.
        recompute: Gradients are made with the loss and kept for the backward pass, which scales them: a second tensor
            of the head's size at that moment. If True, the backward pass makes them, at the cost of the two products
            that give the logits. Reduction `"none"` always does that.
        chunk_rows: Rows of a chunk, each of which needs V logits of student and teacher. If None, 512 to 2048 on a
            GPU: with half precision 2 to 8 KiB for each entry of the vocabulary.

    Returns:
        () float32, or (...) for `"none"`.

    Raises:
        ValueError: Shapes, devices or dtypes that don't match, or a setting out of its range.
    """
    settings = (divergence, beta, temperature, reduction, chunk_rows)
    tensors = _autocast(student_hidden, student_head, teacher_hidden, teacher_head, weights, student_bias, teacher_bias)
    vocab = check(*tensors, vocab_size, *settings)
    return _reduced(tensors, vocab, settings, recompute)


def distill_loss_from_logits(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    student_bias: Tensor | None = None,
    reduction: str = "mean",
    vocab_size: int | None = None,
    recompute: bool = False,
    chunk_rows: int | None = None,
) -> Tensor:
    """`distill_loss` where the teacher's logits (..., V) are at hand: the student's are still never held whole."""
    settings = (divergence, beta, temperature, reduction, chunk_rows)
    tensors = _autocast(student_hidden, student_head, teacher_logits, None, weights, student_bias, None)
    vocab = check(*tensors, vocab_size, *settings)
    return _reduced(tensors, vocab, settings, recompute)


_Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_Settings = tuple[str, float, float, str, int | None]


def _autocast(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor | None,
    weights: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
) -> _Tensors:
    """Under autocast, what a matrix product would take."""
    kind = student_hidden.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        student_hidden, student_head, teacher = (t.to(dtype) for t in (student_hidden, student_head, teacher))
        teacher_head = None if teacher_head is None else teacher_head.to(dtype)
    return student_hidden, student_head, teacher, teacher_head, weights, student_bias, teacher_bias


def _reduced(tensors: _Tensors, vocab: int, settings: _Settings, recompute: bool) -> Tensor:
    """The loss of checked arguments."""
    student_hidden, student_head, teacher, teacher_head, weights, student_bias, teacher_bias = tensors
    divergence, beta, temperature, reduction, chunk_rows = settings
    batch = student_hidden.shape[:-1]
    x, y = (t.reshape(-1, t.shape[-1]) for t in (student_hidden, teacher))
    if weights is None:
        w = torch.ones(x.shape[0], dtype=torch.float32, device=x.device)
    else:
        w = weights.detach().reshape(-1).float()
    fixed = (float(beta), float(temperature), vocab, chunk_rows or 0)
    teachers = (y.detach(), None if teacher_head is None else teacher_head.detach())
    biases = (student_bias, None if teacher_bias is None else teacher_bias.detach())
    trained = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, student_head, student_bias)]
    loss: Tensor
    if reduction == "none" or recompute or not any(trained):
        loss = _losses(x, student_head, *teachers, w, *biases, divergence, *fixed)
        if reduction == "none":
            return loss.view(batch)
        loss = loss.sum()
    else:
        peak = _peak(w, x)
        loss = peak * _kept(x, student_head, *teachers, w / peak, *biases, divergence, *fixed, trained)[0]
    return loss / w.sum().clamp(min=torch.finfo(w.dtype).tiny) if reduction == "mean" else loss


def _peak(weights: Tensor, x: Tensor) -> Tensor:
    """The largest magnitude of weights where the gradient of the logits could fall below float16's range, else 1."""
    if x.dtype == torch.float16 and weights.shape[0]:
        peak = weights.abs().amax()
        return torch.where(peak > 0, peak, torch.ones_like(peak))
    return weights.new_ones(())


@torch.library.custom_op(f"{_NAMESPACE}::losses", mutates_args=())
def _losses(
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
) -> Tensor:
    """Weighted divergences (n,). Their gradients are computed when they are asked for."""
    losses: Tensor = _divergences(
        student_hidden, student_head, teacher, teacher_head, weights, student_bias, teacher_bias, divergence, beta,
        temperature, vocab, chunk_rows, [False] * 3,
    )[0]  # fmt: skip
    return losses


@torch.library.custom_op(f"{_NAMESPACE}::kept", mutates_args=())
def _kept(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the weighted divergences (), and its gradients: hidden, head, bias, each (0,) unless `needs` says so."""
    losses, *grads = _divergences(
        student_hidden, student_head, teacher, teacher_head, weights, student_bias, teacher_bias, divergence, beta,
        temperature, vocab, chunk_rows, needs,
    )  # fmt: skip
    return losses.sum(), grads[0], grads[1], grads[2]


def _divergences(*args: Any) -> tuple[Tensor, ...]:
    with torch.autocast(args[0].device.type, enabled=False):
        results: tuple[Tensor, ...] = run(__package__, "divergences", *args)
    return results


@_losses.register_fake
def _(student_hidden: Tensor, *args: Any) -> Tensor:
    weights: Tensor = args[3]
    return weights.new_empty(weights.shape)


@_kept.register_fake
def _(student_hidden: Tensor, student_head: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights, student_bias, needs = args[2], args[3], args[-1]
    hidden = student_hidden.new_empty(student_hidden.shape if needs[0] else 0)
    head = student_head.new_empty(student_head.shape if needs[1] else 0)
    if student_bias is None:
        return weights.new_empty(()), hidden, head, student_head.new_empty(0)
    return weights.new_empty(()), hidden, head, student_bias.new_empty(student_bias.shape if needs[2] else 0)


# Of 12 inputs, the sixth is the student's bias.
_REST = (None,) * 6


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.fixed = inputs[7:]


def _grads_anew(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, head, teacher, teacher_head, weights, *biases = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 5)]
    weights = weights * grad
    peak = _peak(weights, x)
    grads = _kept(x, head, teacher, teacher_head, weights / peak, *biases, *ctx.fixed, needs)[1:]
    if x.dtype == torch.float16:
        grads = [g * peak for g in grads]
    hidden, heads, bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return hidden, heads, None, None, None, bias, *_REST


def _keep_grads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.needs = inputs[-1]
    ctx.set_materialize_grads(False)


def _kept_grads(ctx: Any, grad: Tensor | None, *second: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(g is not None for g in second):
        raise NotImplementedError("The distillation loss has no second derivative.")
    pairs = zip(ctx.saved_tensors, ctx.needs, strict=True)
    hidden, head, bias = (g * grad if need and grad is not None else None for g, need in pairs)
    return hidden, head, None, None, None, bias, *_REST, None


_losses.register_autograd(_grads_anew, setup_context=_keep_inputs)
_kept.register_autograd(_kept_grads, setup_context=_keep_grads)
