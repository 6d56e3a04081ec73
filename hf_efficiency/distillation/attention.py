"""The student's attention drawn towards the teacher's.

Shape legend: b batch, t tokens, h_s and h_t heads of student and teacher.
"""

import torch
from torch import Tensor

ATTENTION_LOSSES = ("kl", "mse")


def attention_loss(student: Tensor, teacher: Tensor, queries: Tensor, kind: str = "kl") -> Tensor:
    """The distance of the student's attention from the teacher's, averaged over heads and summed over queries.

    Where the numbers of heads differ, the averages over the heads of each are compared.

    Args:
        student: (b, h_s, t, t) probabilities.
        teacher: (b, h_t, t, t).
        queries: (b, t) bool, the tokens whose attention counts.
        kind: `"kl"`: KL(teacher ‖ student) of each query (MiniLM, Wang et al. 2020, equation 2); `"mse"`: the squared
            difference summed over keys.

    Returns:
        ().
    """
    if kind not in ATTENTION_LOSSES:
        raise ValueError(f"attention_loss={kind!r} is unknown: choose one of {', '.join(ATTENTION_LOSSES)}.")
    teacher = teacher.detach().to(student.device)
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    ours = student.float().transpose(1, 2)[queries]  # (n, h, t)
    theirs = teacher.float().transpose(1, 2)[queries]
    if kind == "mse":
        return (ours - theirs).square().sum(-1).mean(-1).sum()
    tiny = torch.finfo(torch.float32).tiny
    terms = theirs * (theirs.clamp(min=tiny).log() - ours.clamp(min=tiny).log())
    return terms.sum(-1).mean(-1).sum()
