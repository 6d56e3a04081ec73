"""Matching of blocks, and the loss between their states."""

from itertools import pairwise, product

import pytest
import torch
from torch.nn import functional as F

from hf_efficiency.distillation.attention import attention_loss
from hf_efficiency.distillation.features import FeatureLoss
from hf_efficiency.distillation.layer_map import best_monotone, cka, resolve_layer_map


def test_named_maps():
    assert resolve_layer_map("uniform", 4, 12) == ((0, 2), (1, 5), (2, 8), (3, 11))  # TinyBERT's g(m) = 3 m
    assert resolve_layer_map("uniform", 3, 3) == ((0, 0), (1, 1), (2, 2))
    assert resolve_layer_map("last", 2, 5) == ((0, 3), (1, 4))
    assert resolve_layer_map("last-1", 4, 12) == ((3, 11),)
    assert resolve_layer_map({0: 1, 2: 5}, 3, 6) == resolve_layer_map([(0, 1), [2, 5]], 3, 6) == ((0, 1), (2, 5))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([(0, 6)], ValueError, "student has blocks 0 to 2 and the teacher 0 to 5"),
        ([(-1, 0)], ValueError, "pairs block -1 of the student"),
        ([(3, 0)], ValueError, "pairs block 3 of the student"),
        ([], ValueError, "is empty or names a pair twice"),
        ([(0, 1), (0, 1)], ValueError, "is empty or names a pair twice"),
        ([(0, 1.0)], TypeError, r"layer_map holds \(0, 1.0\): give pairs"),
        (["ab"], TypeError, "layer_map holds 'ab'"),
        ("last-4", ValueError, "k must be from 1 to 3"),
        ("first", ValueError, "layer_map='first' is unknown: give pairs, or one of uniform"),
        ("similarity", ValueError, "needs the hidden states of both models"),
    ],
)
def test_maps_out_of_range(given, error, message):
    with pytest.raises(error, match=message):
        resolve_layer_map(given, 3, 6)


def test_best_monotone_by_hand():
    """Taking each row's best (columns 3, 0) would cross; the best pair in order is (1, 3): .6 + .5."""
    scores = torch.tensor([[0.5, 0.6, 0.1, 0.9], [0.9, 0.2, 0.3, 0.5]])
    assert best_monotone(scores) == ((0, 1), (1, 3))


@pytest.mark.parametrize(("students", "teachers"), [(3, 6), (4, 4), (5, 3)])
def test_best_monotone_against_all_maps(students, teachers):
    scores = torch.rand(students, teachers, generator=torch.Generator().manual_seed(students))
    step = 1 if students <= teachers else 0

    def allowed(choice):
        return all(b - a >= step for a, b in pairwise(choice))

    best = max(
        (c for c in product(range(teachers), repeat=students) if allowed(c)),
        key=lambda c: sum(float(scores[i, t]) for i, t in enumerate(c)),
    )
    assert best_monotone(scores) == tuple(enumerate(best))


def test_cka():
    """1 of a rotated and scaled copy, small of unrelated states; blocks of a teacher find themselves."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(200, 16, generator=generator) for _ in range(2))
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    found = cka([x], [3 * x @ rotation, y])[0]
    assert found[0] == pytest.approx(1, abs=1e-5)
    assert found[1] < 0.2
    layers = [x, x + 0.5 * y, y]
    assert resolve_layer_map("similarity", 2, 3, cka([layers[0], layers[2]], layers)) == ((0, 0), (1, 2))


@pytest.mark.parametrize("kind", ["mse", "normalized_mse", "cosine"])
def test_feature_loss_by_formula(kind):
    generator = torch.Generator().manual_seed(1)
    student = {0: torch.randn(6, 8, generator=generator), 1: torch.randn(6, 8, generator=generator)}
    teacher = {2: torch.randn(6, 12, generator=generator), 5: torch.randn(6, 12, generator=generator)}
    features = FeatureLoss(((0, 2), (1, 5)), 8, 12, kind)
    expected, errors = [], []
    for (s, t), projection in zip(features.layer_map, features.projections, strict=True):
        ours, target = student[s] @ projection.weight.T, teacher[t]
        relative = ((ours - target) ** 2).sum(-1) / (target**2).sum(-1)
        errors.append(relative.sum())
        expected.append(
            {
                "mse": ((ours - target) ** 2).mean(-1).sum(),
                "normalized_mse": relative.sum(),
                "cosine": sum(1 - torch.dot(a, b) / a.norm() / b.norm() for a, b in zip(ours, target, strict=True)),
            }[kind]
        )
    loss, found = features(student, teacher)
    torch.testing.assert_close(loss, sum(expected) / 2)
    torch.testing.assert_close(found, torch.stack(errors).detach())
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in features.parameters())


def test_projections_begin_as_the_identity_or_orthogonal():
    assert torch.equal(FeatureLoss(((0, 0),), 8, 8).projections[0].weight, torch.eye(8))
    weight = FeatureLoss(((0, 0),), 8, 12).projections[0].weight
    torch.testing.assert_close(weight.T @ weight, torch.eye(8))
    assert torch.equal(weight, FeatureLoss(((0, 0),), 8, 12).projections[0].weight)


def test_unknown_losses():
    with pytest.raises(ValueError, match="hidden_loss='l1' is unknown: choose one of mse"):
        FeatureLoss(((0, 0),), 8, 8, "l1")
    with pytest.raises(ValueError, match="attention_loss='l1' is unknown: choose one of kl, mse"):
        attention_loss(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.ones(1, 1).bool(), "l1")


def causal(b, h, t, seed):
    scores = torch.randn(b, h, t, t, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(~torch.ones(t, t).tril().bool(), -torch.inf).softmax(-1)


def test_attention_loss_by_formula():
    student, teacher = causal(2, 3, 5, 0), causal(2, 3, 5, 1)
    queries = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
    terms = torch.where(teacher > 0, teacher * (teacher / student).log(), 0).sum(-1).mean(1)
    torch.testing.assert_close(attention_loss(student, teacher, queries), terms[queries].sum())
    squares = ((student - teacher) ** 2).sum(-1).mean(1)
    torch.testing.assert_close(attention_loss(student, teacher, queries, "mse"), squares[queries].sum())


def test_attention_of_other_heads_is_averaged():
    student, teacher = causal(1, 2, 4, 0), causal(1, 6, 4, 1)
    queries = torch.ones(1, 4).bool()
    p, q = teacher.mean(1), student.mean(1)
    kl = F.kl_div(q.clamp(min=1e-30).log(), p, reduction="sum")
    torch.testing.assert_close(attention_loss(student, teacher, queries), kl)
