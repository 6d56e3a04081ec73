"""Values and gradients of the divergences against their definitions, written out in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_efficiency.distillation.losses import DIVERGENCES, Objective, divergence, log_softmax
from hf_efficiency.distillation.targets import TopK, closeness, soft_loss, top_k


def definition(name, p, q, beta=0.5, skew=0.1):
    """The divergence of probability vectors, term by term."""

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if name == "skew_kl":
        return kl(p, skew * p + (1 - skew) * q)
    if name == "skew_reverse_kl":
        return kl(q, skew * q + (1 - skew) * p)
    return (p - q).abs().sum(-1) / 2


def logits(seed, rows=5, vocab=11, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return [spread * torch.randn(rows, vocab, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_and_gradients(name, temperature):
    student, teacher = logits(0)
    student.requires_grad_()
    expected = definition(name, (teacher / temperature).softmax(-1), (student / temperature).softmax(-1), 0.3, 0.2)
    (slope,) = torch.autograd.grad(expected.sum(), student)
    log_p, log_q = (log_softmax(z.detach(), temperature) for z in (teacher, student))
    values, grad = divergence(name, log_p, log_q, beta=0.3, skew=0.2)
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(grad / temperature, slope)


def test_by_hand():
    """p = (3/4, 1/4) and q = (1/2, 1/2), where every value is a line of arithmetic."""
    log_p, log_q = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    expected = {
        "forward_kl": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
        "reverse_kl": 0.5 * math.log(2 / 3) + 0.5 * math.log(2),
        "jsd": 0.5 * (0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375))
        + 0.5 * (0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)),
        "skew_kl": 0.75 * math.log(0.75 / 0.525) + 0.25 * math.log(0.25 / 0.475),
        "skew_reverse_kl": 0.5 * math.log(0.5 / 0.725) + 0.5 * math.log(0.5 / 0.275),
        "total_variation": 0.25,
    }
    for name, value in expected.items():
        assert divergence(name, log_p, log_q)[0].item() == pytest.approx(value, rel=1e-5), name
    assert divergence("forward_kl", log_p, log_q)[1][0].tolist() == pytest.approx([-0.25, 0.25])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(DIVERGENCES), spread=st.floats(0.01, 60))
def test_never_negative_and_zero_of_itself(seed, name, spread):
    student, teacher = (z.float() for z in logits(seed, spread=spread))
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    values, grad = divergence(name, log_p, log_q)
    assert values.min() >= -1e-5
    assert grad.isfinite().all()
    assert grad.sum(-1).abs().max() < 1e-3  # adding a constant to all logits changes nothing
    assert divergence(name, log_p, log_p)[0].abs().max() < 1e-5


def test_forbidden_tokens_do_no_harm():
    """Some models give padded entries a logit of -inf."""
    student, teacher = (z.float() for z in logits(1))
    student[:, -1] = teacher[:, -1] = -torch.inf
    for name in DIVERGENCES:
        values, grad = divergence(name, log_softmax(teacher), log_softmax(student))
        assert values.isfinite().all()
        assert grad.isfinite().all()


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "total_variation"])
def test_gradients_keep_their_size_at_high_temperature(name):
    """Hinton et al. 2015, section 2.1: without the square the gradient falls with it; with it, it tends to a limit."""
    student, teacher = logits(2, spread=1.0)

    def size(temperature):
        objective = Objective(name, temperature=temperature)
        _, grad = soft_loss(objective, teacher, log_softmax(student, temperature))
        return grad.norm().item()

    assert size(200.0) == pytest.approx(size(100.0), rel=0.02)
    bare = [
        divergence(name, log_softmax(teacher, t), log_softmax(student, t))[1].norm().item() / t for t in (100.0, 200.0)
    ]
    power = 1 if name == "total_variation" else 2
    assert bare[0] / bare[1] == pytest.approx(2**power, rel=0.02)


def test_high_temperature_limit_is_the_difference_of_logits():
    """Equation 4 of the same: T² dC/dz tends to (z - y) / N where both are centred."""
    student, teacher = logits(3, spread=1.0)
    _, grad = soft_loss(Objective(temperature=1e4), teacher, log_softmax(student, 1e4))
    centred = [z - z.mean(-1, keepdim=True) for z in (student, teacher)]
    torch.testing.assert_close(grad, (centred[0] - centred[1]) / 11, rtol=1e-3, atol=1e-5)


def test_several_divergences_add_up():
    student, teacher = logits(4)
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    values, grad = Objective({"forward_kl": 0.25, "reverse_kl": 2.0}).soft(log_p, log_q)
    parts = [divergence(name, log_p, log_q) for name in ("forward_kl", "reverse_kl")]
    torch.testing.assert_close(values, 0.25 * parts[0][0] + 2 * parts[1][0])
    torch.testing.assert_close(grad, 0.25 * parts[0][1] + 2 * parts[1][1])


@pytest.mark.parametrize(("beta", "same"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_ends_of_the_jsd(beta, same):
    assert Objective("jsd", beta=beta).parts == ((same, 1.0),)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"divergence": "kl"}, "divergence='kl' is unknown: choose one of forward_kl"),
        ({"divergence": {}}, "divergence is empty"),
        ({"divergence": {"jsd": -1.0}}, "the weight -1.0: it must be above 0"),
        ({"beta": 1.5}, "beta=1.5 must be from 0 to 1"),
        ({"skew": 1.0}, "skew=1.0 must be from 0 to below 1"),
        ({"alpha": -0.1}, "alpha=-0.1 must be from 0 to 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"temperature": math.nan}, "temperature=nan must be above 0"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        Objective(**fields)


# Caches.


def merged_definition(name, p, q, ids):
    """The divergence over the kept tokens and one outcome for all others."""
    pairs = [torch.cat([d.gather(-1, ids), 1 - d.gather(-1, ids).sum(-1, keepdim=True)], -1) for d in (p, q)]
    return definition(name, *pairs, 0.3, 0.2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_top_k_values_and_gradients(name, temperature):
    student, teacher = logits(5)
    student.requires_grad_()
    kept = top_k(teacher, 4, temperature)
    p, q = ((z / temperature).softmax(-1) for z in (teacher, student))
    expected = merged_definition(name, p, q, kept.ids) * (temperature if name == "total_variation" else temperature**2)
    (slope,) = torch.autograd.grad(expected.sum(), student)
    objective = Objective(name, beta=0.3, skew=0.2, temperature=temperature)
    values, grad = soft_loss(objective, kept, log_softmax(student.detach(), temperature))
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(grad, slope)


def test_top_k_keeps_the_most_likely():
    kept = top_k(torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log(), 2)
    assert kept.ids.tolist() == [[1, 3]]
    assert kept.outcomes().exp()[0].tolist() == pytest.approx([0.4, 0.3, 0.3])


def test_all_but_one_token_is_everything():
    """With k = V - 1 the rest is one token, so that nothing is lost."""
    student, teacher = logits(6)
    log_q = log_softmax(student)
    full, full_grad = soft_loss(Objective(), teacher, log_q)
    cached, grad = soft_loss(Objective(), top_k(teacher, 10), log_q)
    torch.testing.assert_close(cached, full)
    torch.testing.assert_close(grad, full_grad)


def test_a_cache_never_overstates_the_divergence():
    student, teacher = logits(7)
    log_q = log_softmax(student)
    for k in (1, 3, 6):
        assert (soft_loss(Objective(), top_k(teacher, k), log_q)[0] <= soft_loss(Objective(), teacher, log_q)[0]).all()


def test_certain_teacher_and_student():
    """Where nothing is left for the rest, values and gradients stay finite."""
    teacher = torch.zeros(1, 6)
    teacher[0, 2] = 500.0
    kept = top_k(teacher, 2)
    for student in (teacher, -teacher):
        values, grad = soft_loss(Objective(), kept, log_softmax(student))
        assert values.isfinite().all()
        assert grad.isfinite().all()


@pytest.mark.parametrize("k", [0, 11])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"top_k={k} must be at least 1 and below the vocabulary's 11"):
        top_k(torch.zeros(1, 11), k)


def test_closeness_by_hand():
    teacher, log_q = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.5, 0.1, 0.4]]).log()
    near = closeness(teacher, log_q)
    assert near["kl"].item() == pytest.approx(0.7 * math.log(1.4) + 0.2 * math.log(2) + 0.1 * math.log(0.25), rel=1e-5)
    assert near["acceptance"].item() == pytest.approx(0.5 + 0.1 + 0.1, rel=1e-5)
    assert near["agreement"].item() == 1
    merged = closeness(TopK(torch.tensor([[0]]), teacher[:, :1], torch.tensor([0.3]).log()), log_q)
    assert merged["kl"].item() == pytest.approx(0.7 * math.log(1.4) + 0.3 * math.log(0.3 / 0.5), rel=1e-5)
    assert merged["acceptance"].item() == pytest.approx(0.5 + 0.3, rel=1e-5)
