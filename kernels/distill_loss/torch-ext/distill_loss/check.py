"""What the public functions check. Shape legend as in `op.py`."""

import math

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
REDUCTIONS = ("mean", "sum", "none")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor | None,
    weights: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    vocab_size: int | None,
    divergence: str,
    beta: float,
    temperature: float,
    reduction: str,
    chunk_rows: int | None,
) -> int:
    """The size of the vocabulary, or ValueError. `teacher` is logits where `teacher_head` is None."""
    check_settings(divergence, beta, temperature, reduction, chunk_rows)
    given = "teacher_logits" if teacher_head is None else "teacher_hidden"
    check_head("student_hidden", student_hidden, "student_head", student_head)
    if teacher_head is None:
        check_floating(given, teacher)
    else:
        check_head(given, teacher, "teacher_head", teacher_head)
    batch = student_hidden.shape[:-1]
    if teacher.shape[:-1] != batch:
        raise ValueError(
            f"student_hidden has shape {tuple(student_hidden.shape)}, {given} {tuple(teacher.shape)}: all dimensions "
            "but the last must be the same."
        )
    if weights is not None and weights.shape != batch:
        raise ValueError(f"weights has shape {tuple(weights.shape)}, the rows of student_hidden {tuple(batch)}.")
    if weights is not None and not (weights.is_floating_point() or weights.dtype == torch.bool):
        raise ValueError(f"weights is {weights.dtype}: give a bool mask or floating-point factors.")
    teacher_size = teacher.shape[-1] if teacher_head is None else teacher_head.shape[0]
    check_bias("student_bias", student_bias, student_head.shape[0])
    check_bias("teacher_bias", teacher_bias, teacher_size)
    others = {given: teacher, "student_head": student_head, "teacher_head": teacher_head, "weights": weights}
    for name, tensor in (others | {"student_bias": student_bias, "teacher_bias": teacher_bias}).items():
        if tensor is not None and tensor.device != student_hidden.device:
            raise ValueError(
                f"student_hidden lies on {student_hidden.device} and {name} on {tensor.device}: move them together."
            )
    return vocabulary(student_head.shape[0], teacher_size, vocab_size)


def vocabulary(student: int, teacher: int, vocab_size: int | None) -> int:
    """The number of entries that count, of heads with so many."""
    if vocab_size is None:
        if student != teacher:
            raise ValueError(
                f"The student's vocabulary has {student} entries, the teacher's {teacher}: if both begin with the same "
                "tokens, and only padding differs, give their number as vocab_size."
            )
        vocab_size = student
    if not 1 <= vocab_size <= min(student, teacher):
        raise ValueError(
            f"vocab_size is {vocab_size}, the heads have {student} (student) and {teacher} (teacher) rows."
        )
    return vocab_size


def check_settings(divergence: str, beta: float, temperature: float, reduction: str, chunk_rows: int | None) -> None:
    """ValueError where a setting is out of its range."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}, not one of {', '.join(DIVERGENCES)}.")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, not one of {', '.join(REDUCTIONS)}.")
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f"beta is {beta}: the JSD vanishes at 0 and 1, and needs one between. Its limits have names: forward_kl "
            "(beta near 0) and reverse_kl (beta near 1)."
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: it must be above 0.")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}: it must be 1 or more, or None.")


def check_head(hidden_name: str, hidden: Tensor, head_name: str, head: Tensor) -> None:
    """ValueError unless hidden (..., d) can be multiplied by head (V, d)."""
    check_floating(hidden_name, hidden)
    if head.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != head.shape[1]:
        raise ValueError(
            f"{hidden_name} has shape {tuple(hidden.shape)} and {head_name} {tuple(head.shape)}: they must be (..., d) "
            "and (V, d)."
        )
    if hidden.dtype != head.dtype:
        raise ValueError(f"{hidden_name} is {hidden.dtype} and {head_name} {head.dtype}: they must be alike.")


def check_bias(name: str, bias: Tensor | None, size: int) -> None:
    """ValueError unless bias is None or fits a head of `size` rows."""
    if bias is None:
        return
    check_floating(name, bias)
    if bias.shape != (size,):
        raise ValueError(f"{name} has shape {tuple(bias.shape)}, its head has {size} rows.")


def check_floating(name: str, x: Tensor) -> None:
    """ValueError unless a kernel takes the dtype of x."""
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name} is {x.dtype}: cast it to float16, bfloat16 or float32.")
