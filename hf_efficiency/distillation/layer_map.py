"""Which block of the student imitates which block of the teacher.

Shape legend: n rows (tokens), d_s and d_t features, S and T numbers of blocks.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

LayerMap = tuple[tuple[int, int], ...]
STRATEGIES = ("uniform", "last", "last-k", "similarity")


def resolve_layer_map(
    layer_map: str | Mapping[int, int] | Iterable[Sequence[int]],
    student_layers: int,
    teacher_layers: int,
    similarity: Tensor | None = None,
) -> LayerMap:
    """Pairs (student block, teacher block), both counted from 0.

    Args:
        layer_map: Pairs, or a mapping; `"uniform"`: the student's blocks spread evenly over the teacher's (TinyBERT,
            Jiao et al. 2020, section 4.1); `"last"` or `"last-k"`: the last blocks of both, all of the student's or
            k; `"similarity"`: those that are most alike, in order.
        student_layers: S.
        teacher_layers: T.
        similarity: (S, T), for `"similarity"`: see `cka`.

    Raises:
        ValueError: A block that does not exist, an empty map, an unknown name.
        TypeError: No pairs of whole numbers.
    """
    if isinstance(layer_map, str):
        return _named(layer_map, student_layers, teacher_layers, similarity)
    given = layer_map.items() if isinstance(layer_map, Mapping) else layer_map
    pairs = []
    for pair in given:
        if isinstance(pair, str) or len(pair) != 2 or not all(type(i) is int for i in pair):
            raise TypeError(f"layer_map holds {pair!r}: give pairs (student block, teacher block) of whole numbers.")
        student, teacher = pair
        if not (0 <= student < student_layers and 0 <= teacher < teacher_layers):
            raise ValueError(
                f"layer_map pairs block {student} of the student with block {teacher} of the teacher, but the student "
                f"has blocks 0 to {student_layers - 1} and the teacher 0 to {teacher_layers - 1}."
            )
        pairs.append((student, teacher))
    if not pairs or len(set(pairs)) < len(pairs):
        raise ValueError(f"layer_map={layer_map!r} is empty or names a pair twice.")
    return tuple(pairs)


def _named(name: str, student_layers: int, teacher_layers: int, similarity: Tensor | None) -> LayerMap:
    if name == "uniform":
        return tuple((i, -(-(i + 1) * teacher_layers // student_layers) - 1) for i in range(student_layers))
    match = re.fullmatch(r"last(?:-(\d+))?", name)
    if match:
        k = int(match[1]) if match[1] else min(student_layers, teacher_layers)
        if not 1 <= k <= min(student_layers, teacher_layers):
            raise ValueError(
                f"layer_map={name!r}: the student has {student_layers} blocks and the teacher {teacher_layers}, so k "
                f"must be from 1 to {min(student_layers, teacher_layers)}."
            )
        return tuple((student_layers - i, teacher_layers - i) for i in range(k, 0, -1))
    if name == "similarity":
        if similarity is None:
            raise ValueError("layer_map='similarity' needs the hidden states of both models: there are none.")
        return best_monotone(similarity)
    raise ValueError(f"layer_map={name!r} is unknown: give pairs, or one of {', '.join(STRATEGIES)}.")


def best_monotone(similarity: Tensor) -> LayerMap:
    """For each student block a teacher block, in rising order, so that the sum of `similarity` (S, T) is greatest.

    Blocks of the teacher are used once where there are enough of them.
    """
    scores = similarity.double().cpu()
    students, teachers = scores.shape
    step = 1 if students <= teachers else 0
    best = torch.full((students, teachers), -torch.inf, dtype=torch.float64)
    source = torch.zeros(students, teachers, dtype=torch.long)
    best[0] = scores[0]
    for s in range(1, students):
        reach, at = best[s - 1].cummax(0)  # the best place of the block before, among teachers up to t
        best[s, step:] = scores[s, step:] + reach[: teachers - step]
        source[s, step:] = at[: teachers - step]
    t = int(best[-1].argmax())
    pairs = []
    for s in range(students - 1, -1, -1):
        pairs.append((s, t))
        t = int(source[s, t])
    return tuple(reversed(pairs))


def cka(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Linear centred kernel alignment (Kornblith et al. 2019, section 3) of each x (n, d_s) with each y (n, d_t).

    Rows are scaled to length 1 first: the few tokens whose states are a hundred times larger would decide alone.

    Returns:
        (S, T), from 0 to 1.
    """
    grams = [[_centred_gram(x) for x in group] for group in (xs, ys)]
    return torch.tensor([[float((a * b).sum()) for b in grams[1]] for a in grams[0]])


def _centred_gram(x: Tensor) -> Tensor:
    rows = torch.nn.functional.normalize(x.detach().double().cpu(), dim=-1)
    rows = rows - rows.mean(0)
    gram = rows @ rows.T
    return gram / gram.norm().clamp(min=torch.finfo(gram.dtype).tiny)
