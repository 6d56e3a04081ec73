"""The loss by the kernel `distill_loss`, where that covers the case.

Shape legend: n rows (tokens with a label), V vocabulary, d_s and d_t features of student and teacher.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_efficiency.distillation.heads import OutputHead
from hf_efficiency.distillation.teachers import ModelRows
from hf_efficiency.kernels.distill_loss import distill_loss

if TYPE_CHECKING:
    from hf_efficiency.distillation.chunked import Job

_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def fused_loss(job: "Job", head: OutputHead, hidden: Tensor) -> Tensor | None:
    """The objective summed over rows (), with its gradient; None where the kernel does not cover it.

    It covers one forward KL, reverse KL or JSD without a hard loss and without measures for the log, between two plain
    heads on one device.

    Args:
        job: What to compute.
        head: The student's.
        hidden: (n, d_s).
    """
    objective, rows = job.objective, job.teacher
    name, weight = objective.parts[0]
    alone = len(objective.parts) == 1 and name in _DIVERGENCES and objective.alpha == 1 and not job.monitor
    if not alone or not isinstance(rows, ModelRows) or rows.hidden.device != hidden.device:
        return None
    ours, theirs = head.linear(), rows.head.linear()
    if ours is None or theirs is None:
        return None
    typed = hidden.dtype == ours[0].dtype and rows.hidden.dtype == theirs[0].dtype
    if not typed and not torch.is_autocast_enabled(hidden.device.type):
        return None
    loss: Tensor = distill_loss(
        hidden,
        ours[0],
        rows.hidden,
        theirs[0],
        divergence=name,
        beta=objective.beta if name == "jsd" else 0.5,
        temperature=objective.temperature,
        student_bias=ours[1],
        teacher_bias=theirs[1],
        reduction="sum",
        vocab_size=job.vocab,
        chunk_rows=job.rows,
    )
    return loss * (weight * objective.scale(name))
