"""The loss over the logits of student and teacher, a few rows at a time, so that (tokens, vocabulary) is never held.

Shape legend: n rows (tokens with a label), c rows of a chunk, V vocabulary, d features.

The gradient of a chunk's logits is known as soon as its loss is, so it is sent back through the head at once; what is
kept for the backward pass is the gradient of the hidden states and that of the head. This needs the products of an
unchunked loss and no more, while checkpointing each chunk would repeat those that make the logits. On a GPU the kernel
`distill_loss` does the same where it covers the case.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_efficiency.distillation.fused import fused_loss
from hf_efficiency.distillation.heads import LinearPass, ModulePass, OutputHead
from hf_efficiency.distillation.losses import Objective, log_softmax
from hf_efficiency.distillation.targets import Target, closeness, soft_loss

# Logits of a chunk: enough rows for efficient products, few enough for the caches of a CPU.
_CPU_LOGITS, _GPU_LOGITS = 2**22, 2**25

# The teacher's word on a slice of the rows.
Teacher = Callable[[slice], Target]
Pass = LinearPass | ModulePass


@dataclass
class Job:
    """One evaluation of the loss.

    Attributes:
        objective: What is minimised.
        labels: (n,) int64, the next tokens.
        teacher: Gives logits on the student's device, or a cache's rows; None if the soft loss is not wanted.
        vocab: V, columns that count, of student and teacher alike.
        rows: Rows of a chunk; None: by the size of the vocabulary.
        monitor: Whether to measure how close the two are, beyond the loss.
    """

    objective: Objective
    labels: Tensor
    teacher: Teacher | None
    vocab: int
    rows: int | None = None
    monitor: bool = False

    def chunk(self, part: slice, logits: Tensor, *, gradient: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        """Sums over the rows of a chunk, and the gradient (c, V) of their loss with respect to its logits."""
        temperature, alpha = self.objective.temperature, self.objective.alpha
        target = None if self.teacher is None else self.teacher(part)
        tempered = log_softmax(logits, temperature)
        sums, grad = {}, None
        if target is not None:
            losses, grad = soft_loss(self.objective, target, tempered, gradient=gradient and alpha > 0)
            sums["soft"] = losses.sum()
            grad = grad if grad is None or alpha == 1 else grad.mul_(alpha)
        if alpha < 1 or self.monitor or target is None:
            plain = tempered if temperature == 1 else log_softmax(logits)
            labels = self.labels[part, None]
            sums["hard"] = -plain.gather(-1, labels).sum()
            if self.monitor and target is not None:
                cached = not isinstance(target, Tensor)  # a cache knows its own temperature only
                near = closeness(target, tempered if cached else plain, temperature if cached else 1.0)
                sums |= {name: value.sum() for name, value in near.items()}
            weight = 1 - alpha if target is not None else 1.0
            if gradient and weight > 0:
                hard = plain.exp().scatter_add_(-1, labels, torch.full_like(labels, -1, dtype=plain.dtype))
                grad = hard.mul_(weight) if grad is None else grad.add_(hard, alpha=weight)
        return sums, grad

    def total(self, sums: dict[str, Tensor]) -> Tensor:
        """The loss, summed over rows: what the gradients are of."""
        alpha = self.objective.alpha if self.teacher is not None else 0.0
        parts = [weight * sums[name] for name, weight in (("soft", alpha), ("hard", 1 - alpha)) if weight]
        return torch.stack(parts).sum()

    def sweep(self, run: Pass, n: int, *, gradient: bool) -> dict[str, Tensor]:
        """Sums over all rows; `run` holds the gradients of the loss afterwards."""
        total: dict[str, Tensor] = {}
        device = run.hidden.device
        rows = self.rows or max(1, (_GPU_LOGITS if device.type == "cuda" else _CPU_LOGITS) // self.vocab)
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            sums, grad = self.chunk(part, run.logits(part), gradient=gradient)
            if grad is not None:
                run.backward(part, grad)
            total = {name: value.double() + total.get(name, 0.0) for name, value in sums.items()}
        return total


class _Chunked(torch.autograd.Function):
    """The loss and, made with it, the gradients that the backward pass hands out."""

    @staticmethod
    def forward(ctx: Any, job: Job, head: OutputHead, sums: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        hidden = inputs[0]
        run = _pass_of(head, hidden, job.vocab, gradient=True)
        sums |= job.sweep(run, len(hidden), gradient=True)
        ctx.grads, ctx.dtypes = run.grads(), [t.dtype for t in inputs]
        return job.total(sums).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("The distillation loss keeps its gradients for one backward pass only.")
        kept, ctx.grads = ctx.grads, None
        pairs = zip(kept, ctx.dtypes, strict=True)
        return None, None, None, *(None if g is None else g.mul_(grads[0]).to(dtype) for g, dtype in pairs)


def _pass_of(head: OutputHead, hidden: Tensor, vocab: int, *, gradient: bool) -> Pass:
    linear = head.linear()
    if linear is None:
        return ModulePass(hidden, head, vocab, gradient=gradient)
    return LinearPass(hidden, *linear, vocab, gradient=gradient)


def chunked_loss(job: Job, head: OutputHead, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective, summed over rows, with its gradient; and sums over the rows for the log.

    Args:
        job: What to compute.
        head: The student's; its trained parameters get gradients.
        hidden: (n, d), what the head would multiply.

    Returns:
        The loss () float32. The sums () float64: `soft` and `hard` losses (the latter is the student's negative
        log-likelihood), and, where the job monitors, `kl`, `agreement`, `acceptance`. Those not computed are missing.
    """
    sums: dict[str, Tensor] = {}
    parameters = head.parameters
    if not len(hidden):  # every parameter still takes part, as other processes expect of it
        return torch.stack([hidden.sum(), *(p.sum() for p in parameters)]).sum().float() * 0.0, sums
    fused = fused_loss(job, head, hidden) if hidden.is_cuda else None
    if fused is not None:
        return fused, {"soft": fused.detach().double()}
    if torch.is_grad_enabled() and (hidden.requires_grad or parameters):
        loss: Tensor = _Chunked.apply(job, head, sums, hidden, *parameters)
        return loss, sums
    with torch.no_grad():
        sums |= job.sweep(_pass_of(head, hidden, job.vocab, gradient=False), len(hidden), gradient=False)
    return job.total(sums).float(), sums
