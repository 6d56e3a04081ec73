"""Whether student and teacher speak of the same tokens."""

from typing import Any


def shared_vocabulary(
    student_size: int,
    teacher_size: int,
    student_tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    vocab_size: int | None = None,
) -> int:
    """How many columns of the logits both have in common, from the first on.

    Embeddings of one tokenizer are often padded to different sizes; the columns of the padding are left out.

    Args:
        student_size: Columns of the student's logits.
        teacher_size: Those of the teacher's.
        student_tokenizer: If known.
        teacher_tokenizer: If known.
        vocab_size: What the caller says they share; None: find out.

    Raises:
        ValueError: The tokenizers differ, the sizes differ and nothing says why, or `vocab_size` is out of range.
    """
    least = min(student_size, teacher_size)
    if vocab_size is not None:
        if not 1 <= vocab_size <= least:
            raise ValueError(
                f"vocab_size={vocab_size} must be from 1 to {least}: the student has {student_size} logits a token, "
                f"the teacher {teacher_size}."
            )
        return vocab_size
    if student_tokenizer is not None and teacher_tokenizer is not None:
        differing = _first_difference(student_tokenizer, teacher_tokenizer, least)
        if differing is None:
            return least
        index, ours, theirs = differing
        raise ValueError(
            f"Student and teacher have different tokenizers (token {index} is {ours!r} and {theirs!r}), so their "
            "distributions can't be compared token by token: choose a teacher with the student's tokenizer, use TRL's "
            "GOLD trainer (trl.experimental.gold), which distils across tokenizers, or let the teacher write the data "
            "(write_sequences) and set alpha=0."
        )
    known = student_tokenizer if student_tokenizer is not None else teacher_tokenizer
    if student_size == teacher_size or (known is not None and len(known) <= least):
        return least
    raise ValueError(
        f"The student has {student_size} logits a token and the teacher {teacher_size}. If they have one tokenizer and "
        "only their embeddings are padded, pass processing_class=, or vocab_size= in the config; with different "
        "tokenizers use TRL's GOLD trainer (trl.experimental.gold)."
    )


def _first_difference(ours: Any, theirs: Any, size: int) -> tuple[int, str | None, str | None] | None:
    """The first id below `size` that both tokenizers know and that stands for different tokens."""
    tables = [{index: token for token, index in t.get_vocab().items() if index < size} for t in (ours, theirs)]
    known = sorted(tables[0].keys() & tables[1].keys())
    if not known:
        return 0, tables[0].get(0), tables[1].get(0)
    return next(((i, tables[0][i], tables[1][i]) for i in known if tables[0][i] != tables[1][i]), None)
