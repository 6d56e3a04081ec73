"""The loop over chunks of rows that kernel and reference share: matrix products, with a fused step between them.

Shape legend: n rows (tokens), c rows of a chunk, V vocabulary, W width of a buffer (V and some padding), d_s and d_t
features of student and teacher.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Of a logits buffer, where that leaves enough rows: 64 MiB of half precision.
_ELEMENTS = 2**25
# With fewer rows, a GPU spends longer on reading the heads than on multiplying.
_FEWEST_ROWS = 512
_MOST_ROWS = 2048
# On a GPU the head's gradient is summed over chunks in the head's dtype: so few roundings cost about one bit. A float32
# sum would hold 4 bytes more for each element of the head, 10 % to 20 % of the plain loss's memory at 4096 rows and d_s
# 2048 to 4096, whatever V, where 10 % is the bound for all of this loss. And each chunk of 512 rows would read and
# write it, 8 bytes an element at 3 TB/s, in twice the time of its product.
_CHUNKS = 8
_CPU_ELEMENTS = 2**22

# (student logits (c, W), teacher logits (c, W or more), weights (c,), ...) -> losses (c,); see `reference.divergence_`.
Fused = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, "Settings"], Tensor]


class Settings(NamedTuple):
    """What all chunks share.

    Attributes:
        divergence: `"forward_kl"`, `"reverse_kl"` or `"jsd"`.
        beta: Of `"jsd"`.
        temperature: Divides the logits.
        vocab: V: columns beyond it don't count.
        gradient: The student's logits are to be overwritten by their gradient.
    """

    divergence: str
    beta: float
    temperature: float
    vocab: int
    gradient: bool


class Result(NamedTuple):
    """What `sweep` gives: weighted losses (n,) and the gradients of their sum, each empty (0,) unless asked for."""

    losses: Tensor
    hidden: Tensor
    head: Tensor
    bias: Tensor


def rows_of_chunk(n: int, vocab: int, on_gpu: bool, trains_head: bool) -> int:
    """Rows of a chunk: few enough that its logits stay small beside (n, V), enough for efficient matrix products.

    On a GPU 512 to 2048. Two buffers of 512 rows of half precision take 2 KiB for each entry of the vocabulary.
    """
    if not on_gpu:
        return max(1, min(n, _CPU_ELEMENTS // vocab))
    rows = max(_FEWEST_ROWS, min(_ELEMENTS // vocab, _MOST_ROWS))
    if trains_head:
        rows = max(rows, min(-(-n // _CHUNKS), _MOST_ROWS))
    even = -(-n // max(1, -(-n // rows)))
    return max(1, min(n, -(-even // 128) * 128))


@torch.no_grad()
def sweep(
    fused: Fused,
    student_hidden: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor | None,
    weights: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    settings: Settings,
    chunk_rows: int,
    needs: list[bool],
) -> Result:
    """Losses of all rows, and gradients, chunk by chunk.

    Args:
        fused: From a chunk's logits to its losses and the gradient of the logits.
        student_hidden: (n, d_s).
        student_head: (V or more, d_s).
        teacher: Hidden states (n, d_t), or logits (n, V or more) where `teacher_head` is None.
        teacher_head: (V or more, d_t).
        weights: (n,).
        student_bias: (V or more,).
        teacher_bias: (V or more,).
        settings: Of the divergence.
        chunk_rows: Rows of a chunk; 0: as `rows_of_chunk` has it.
        needs: Whether the gradients of student_hidden, student_head and student_bias are wanted.
    """
    n, vocab = len(student_hidden), settings.vocab
    rows = chunk_rows or rows_of_chunk(n, vocab, student_hidden.is_cuda, needs[1])
    width = -(-vocab // 64) * 64  # aligned rows, whatever V
    student_logits = student_hidden.new_empty(min(rows, n), width)
    teacher_logits = None if teacher_head is None else teacher.new_empty(min(rows, n), width)
    losses = weights.new_empty(n)
    grads = _Gradients(student_hidden, student_head, student_bias, vocab, needs)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        ours = student_logits[: part.stop - start]
        torch.mm(student_hidden[part], student_head[:vocab].T, out=ours[:, :vocab])
        if teacher_head is None or teacher_logits is None:
            theirs = teacher[part]
        else:
            theirs = teacher_logits[: part.stop - start]
            torch.mm(teacher[part], teacher_head[:vocab].T, out=theirs[:, :vocab])
        losses[part] = fused(ours, theirs, weights[part], student_bias, teacher_bias, settings)
        if settings.gradient:
            grads.add(ours[:, :vocab], part, weights[part])
    return Result(losses, *grads.finished())


class _Gradients:
    """The student's gradients, from the gradients of its logits."""

    def __init__(self, hidden: Tensor, head: Tensor, bias: Tensor | None, vocab: int, needs: list[bool]) -> None:
        self.inputs, self.vocab = (hidden, head), vocab
        self.hidden = hidden.new_empty(hidden.shape if needs[0] else 0)
        wide = head.dtype if head.is_cuda else torch.promote_types(head.dtype, torch.float32)
        self.head = head.new_empty(head.shape if needs[1] else 0, dtype=wide)
        self.head[vocab if len(hidden) else 0 :] = 0
        self.bias = head.new_zeros(bias.shape if needs[2] and bias is not None else 0, dtype=_wide(head.dtype))
        self.dtypes = head.dtype, head.dtype if bias is None else bias.dtype

    def add(self, logits: Tensor, part: slice, weights: Tensor) -> None:
        """Adds what a chunk contributes: `logits` (c, V) is the gradient of its logits."""
        hidden, head = self.inputs[0][part], self.inputs[1][: self.vocab]
        if self.hidden.numel():
            torch.mm(logits, head, out=self.hidden[part])
        if self.head.numel():
            # Padding may hold anything, even NaN, which a gradient of zero would not silence.
            hidden = hidden.masked_fill(weights.eq(0)[:, None], 0)
            first = part.start == 0  # nothing to add to: saves a pass over the head's gradient
            product = logits.T.to(self.head.dtype), hidden.to(self.head.dtype)
            self.head[: self.vocab].addmm_(*product, beta=0 if first else 1)
        if self.bias.numel():
            self.bias[: self.vocab] += logits.sum(0, dtype=self.bias.dtype)

    def finished(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of hidden, head and bias, in the dtypes of these."""
        return self.hidden, self.head.to(self.dtypes[0]), self.bias.to(self.dtypes[1])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
