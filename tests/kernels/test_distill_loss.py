"""The distillation loss: kernel against reference, the reference against torch's autograd of the plain formula."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_efficiency.kernels.distill_loss import chunked, distill_loss, distill_loss_from_logits, kernel, op, reference
from tests.kernels.harness import DTYPES, assert_close, guarded, guards_intact, poisoned

KINDS = ("forward_kl", "reverse_kl", "jsd")
# (n, V, d_s, d_t, rows of a chunk): tiny, odd, more than one block of the kernel, and exactly one.
SHAPES = [(1, 1, 1, 1, 0), (5, 37, 16, 24, 2), (3, 8203, 8, 5, 2), (4, 4096, 8, 8, 3)]


def problem(n, vocab, d_s, d_t, dtype=torch.float32, wrap=lambda t: t):
    """Hidden states and heads with logits of deviation about 2, weights with a zero."""
    generator = torch.Generator().manual_seed(n + vocab)

    def draw(*shape, scale=1.0):
        return wrap((torch.randn(*shape, generator=generator) * scale).to(dtype))

    x, w = draw(n, d_s), draw(vocab, d_s, scale=2 / math.sqrt(d_s))
    y, u = draw(n, d_t), draw(vocab, d_t, scale=2 / math.sqrt(d_t))
    weights = torch.rand(n, generator=generator) + 0.5
    if n > 1:
        weights[1] = 0
    return x, w, y, u, wrap(weights)


def plain(student, teacher, kind, beta=0.5, temperature=1.0):
    """Divergences of logits (..., V) as torch has them, with the whole logits."""
    log_q, log_p = ((z / temperature).log_softmax(-1) for z in (student, teacher))
    if kind == "forward_kl":
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if kind == "reverse_kl":
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    of_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    of_student = F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
    return beta * of_teacher + (1 - beta) * of_student


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_follows_reference(shape, kind, dtype):
    *shape, chunk = shape
    tensors = problem(*shape, dtype, guarded)
    biases = [guarded(torch.randn(shape[1]).to(dtype)) for _ in range(2)]
    for given in ((None, None), biases):
        args = (*tensors, *given, kind, 0.3, 2.0, shape[1], chunk, [True, True, given[0] is not None])
        with poisoned():
            actual = kernel.divergences(*args)
        expected = reference.divergences(*args)
        if shape[1] == 1:
            assert all(t.abs().max() < 1e-5 for t in (*actual, *expected) if t.numel())
            continue
        for ours, wanted in zip(actual, expected, strict=True):
            assert_close(ours, wanted)
    assert all(map(guards_intact, (*tensors, *biases)))


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_autograd_of_the_plain_formula(kind, reduction):
    """Loss and gradients in float32 are those that torch finds in float64."""
    x, w, y, u, weights = problem(7, 53, 12, 9)
    bias = torch.randn(53)
    incoming = torch.randn(7) if reduction == "none" else torch.tensor(1.7)
    ours = [t.clone().requires_grad_() for t in (x, w, bias)]
    options = {"beta": 0.2, "temperature": 1.5, "weights": weights, "reduction": reduction, "chunk_rows": 3}
    loss = distill_loss(ours[0], ours[1], y, u, divergence=kind, student_bias=ours[2], **options)
    double = [t.double().requires_grad_() for t in (x, w, bias)]
    rows = plain(double[0] @ double[1].T + double[2], y.double() @ u.double().T, kind, 0.2, 1.5) * weights
    expected = {"sum": rows.sum(), "mean": rows.sum() / weights.double().sum(), "none": rows}[reduction]
    assert_close(loss.detach().double(), expected.detach(), 2e-5)
    grads = torch.autograd.grad(loss, ours, incoming)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, double, incoming.double()), strict=True):
        assert_close(actual.double(), wanted, 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_reference(kind, monkeypatch):
    monkeypatch.setenv("HF_EFFICIENCY_KERNELS", "reference")
    x, w, y, u, weights = (t.double() for t in problem(3, 7, 4, 5))
    bias = torch.randn(7, dtype=torch.double, requires_grad=True)
    x, w = x.requires_grad_(), w.requires_grad_()
    fixed = (kind, 0.3, 1.3, 6, 2)

    def rows(x, w, bias):
        return op._losses(x, w, y, u, weights, bias, None, *fixed)

    def total(x, w, bias):
        return op._kept(x, w, y, u, weights, bias, None, *fixed, [True] * 3)[0]

    assert torch.autograd.gradcheck(rows, (x, w, bias))
    assert torch.autograd.gradcheck(total, (x, w, bias))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_touched_around_the_buffers(kind):
    """A chunk of rows with padding, and the teacher's logits with none."""
    ours, theirs = torch.randn(3, 64), guarded(torch.randn(3, 37))
    ours[:, 37:] = math.nan
    logits, weights = guarded(ours), guarded(torch.tensor([1.0, 0.0, 2.0]))
    settings = chunked.Settings(kind, 0.4, 1.0, 37, True)
    with poisoned():
        losses = kernel.divergence_(logits, theirs, weights, None, None, settings)
    assert_close(losses, reference.divergence_(ours, theirs, weights, None, None, settings))
    assert_close(logits[:, :37], ours[:, :37])
    assert all(map(guards_intact, (logits, theirs, weights)))


def test_backward_twice():
    """What the first backward pass gave stays what it is."""
    x, w, y, u, _ = problem(4, 30, 8, 8)
    x, w = x.requires_grad_(), w.requires_grad_()
    loss = distill_loss(x, w, y, u)
    once = torch.autograd.grad(loss, (x, w), retain_graph=True)
    twice = torch.autograd.grad(loss * 2, (x, w))
    for a, b in zip(once, twice, strict=True):
        assert_close(2 * a, b)


def test_numbers_by_hand():
    """Student (1/2, 1/2), teacher (3/4, 1/4): logits 0, 0 and ln 3, 0."""
    x, y, head = torch.zeros(1, 2), torch.tensor([[math.log(3), 0]]), torch.eye(2)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    jsd = 0.5 * (0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3)) + 0.5 * (
        0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)
    )
    for kind, expected in zip(KINDS, (forward, reverse, jsd), strict=True):
        assert distill_loss(x, head, y, head, divergence=kind).item() == pytest.approx(expected, rel=1e-6)


def test_ends_of_the_jsd():
    """JSD / beta tends to the forward KL for small beta, JSD / (1 - beta) to the reverse KL for beta near 1."""
    x, w, y, u, _ = problem(4, 21, 8, 8)
    x, y = x / 4, y / 4
    forward, reverse = (distill_loss(x, w, y, u, divergence=kind) for kind in KINDS[:2])
    small = distill_loss(x, w, y, u, divergence="jsd", beta=1e-3) / 1e-3
    large = distill_loss(x, w, y, u, divergence="jsd", beta=1 - 1e-3) / 1e-3
    assert small.item() == pytest.approx(forward.item(), rel=0.02)
    assert large.item() == pytest.approx(reverse.item(), rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(kind):
    """Logits of ±1e4, and biases of -inf in both, as banned tokens have."""
    x, w, y, u, _ = problem(5, 41, 8, 8)
    x, y = x / x.abs().max() * 6e3, y / y.abs().max() * 6e3
    x[0], w[7], u[7] = y[0], u[0], w[0]
    assert (x @ w.T).abs().max() > 1e4
    bias = torch.zeros(41)
    bias[[3, 40]] = -math.inf
    x.requires_grad_()
    loss = distill_loss(x, w, y, u, divergence=kind, student_bias=bias, teacher_bias=bias, reduction="sum")
    keep = bias == 0
    double = x.detach().double().requires_grad_()
    logits = double @ w[keep].double().T, y.double() @ u[keep].double().T
    log_q, log_p = (z.log_softmax(-1) for z in logits)
    expected = plain(*logits, kind).sum() if kind != "jsd" else jsd_in_logarithms(log_p, log_q)
    assert_close(loss.detach().double(), expected.detach(), 1e-5)
    actual, wanted = torch.autograd.grad(loss, x)[0].double(), torch.autograd.grad(expected, double)[0]
    torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-6)


def jsd_in_logarithms(log_p, log_q):
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return sum(0.5 * (a.exp() * (a - log_m)).sum() for a in (log_p, log_q))


def test_equal_models_have_no_loss():
    x, w, *_ = problem(4, 50, 8, 8)
    x.requires_grad_()
    for kind in KINDS:
        loss = distill_loss(x, w, x, w, divergence=kind, reduction="sum")
        assert abs(loss.item()) < 1e-5
        assert torch.autograd.grad(loss, x)[0].abs().max() < 1e-5


@pytest.mark.parametrize("module", [kernel, reference])
def test_rows_of_weight_0_may_hold_anything(module):
    x, w, y, u, _ = problem(6, 19, 8, 8)
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1])
    keep = mask.bool()
    dirty = x.clone(), y.clone()
    dirty[0][1], dirty[1][4] = math.nan, math.inf
    for kind in KINDS:
        rest = (None, None, kind, 0.5, 1.0, 19, 4, [True, True, False])
        losses, hidden, head, _ = module.divergences(dirty[0], w, dirty[1], u, mask, *rest)
        wanted = reference.divergences(x[keep], w, y[keep], u, mask[keep], *rest)
        assert (losses[~keep] == 0).all()
        assert (hidden[~keep] == 0).all()
        for actual, expected in zip((losses[keep], hidden[keep], head), wanted, strict=False):
            assert_close(actual, expected)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation inside gives."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() * t.element_size() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return out


@pytest.mark.parametrize("module", [kernel, reference])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_holds_the_logits(module, kind):
    n, vocab, d = 64, 300, 4
    x, w, y, u, weights = problem(n, vocab, d, d)
    with Largest() as seen:
        module.divergences(x, w, y, u, weights, None, None, kind, 0.5, 1.0, vocab, 4, [True, True, False])
    assert seen.bytes <= 4 * max(4 * 320, vocab * d)
    with Largest() as seen:
        plain(x @ w.T, y @ u.T, kind)
    assert seen.bytes == 4 * n * vocab


def test_rows_of_a_chunk():
    """What docstring and card promise, at the shapes of the benchmark."""
    assert chunked.rows_of_chunk(4096, 32000, True, True) == 1024
    assert chunked.rows_of_chunk(4096, 256000, True, True) == 512
    assert chunked.rows_of_chunk(32768, 128256, True, True) == 2048
    assert chunked.rows_of_chunk(32768, 128256, True, False) == 512
    assert chunked.rows_of_chunk(600, 128256, True, False) == 384
    assert chunked.rows_of_chunk(1 << 20, 1 << 17, False, True) == 32
    assert chunked.rows_of_chunk(3, 128256, True, True) == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_kept_and_recomputed_agree(dtype):
    x, w, y, u, weights = problem(9, 65, 8, 8, dtype)
    x, w = x.requires_grad_(), w.requires_grad_()
    grads = []
    for recompute in (False, True):
        loss = distill_loss(x, w, y, u, weights=weights * 1e-4, recompute=recompute) * 64
        grads.append(torch.autograd.grad(loss, (x, w)))
    for kept, anew in zip(*grads, strict=True):
        assert_close(kept, anew)


def test_small_weights_survive_float16():
    """Gradients of the logits lie below float16's range here, those of the hidden states don't."""
    x, w, y, u, _ = problem(4, 2000, 8, 8, torch.float16)
    for recompute in (False, True):
        grads = []
        for scale in (1e-6, 1.0):
            leaf = x.clone().requires_grad_()
            options = {"weights": torch.full((4,), scale), "reduction": "sum", "recompute": recompute}
            distill_loss(leaf, w, y, u, **options).mul(1 / scale).backward()
            grads.append(leaf.grad)
        assert_close(*grads, tolerance=2e-3)


def test_strided_and_batched_input():
    x, w, y, u, weights = problem(12, 35, 8, 6)
    expected = distill_loss(x, w, y, u, weights=weights, reduction="none")
    apart = torch.stack([x, x], -1)[..., 0]
    turned = y.T.contiguous().T
    heads = w.T.contiguous().T, torch.cat([u, u], 1)[:, :6]
    actual = distill_loss(apart, heads[0], turned, heads[1], weights=weights, reduction="none")
    assert_close(actual, expected)
    batched = distill_loss(x.view(3, 4, 8), w, y.view(3, 4, 6), u, weights=weights.view(3, 4), reduction="none")
    assert_close(batched, expected.view(3, 4))


def test_logits_of_the_teacher():
    x, w, y, u, weights = problem(6, 35, 8, 6)
    x.requires_grad_()
    logits = y @ u.T
    wider = torch.full((6, 50), math.nan)
    wider[:, :35] = logits
    for kind in KINDS:
        expected = distill_loss(x, w, y, u, weights=weights, divergence=kind)
        for given in (guarded(logits), logits.T.contiguous().T, wider):
            actual = distill_loss_from_logits(x, w, given, weights=weights, divergence=kind, vocab_size=35)
            assert_close(actual.detach(), expected.detach())


def test_padded_vocabulary():
    x, w, y, u, _ = problem(5, 30, 8, 8)
    junk = torch.full((9, 8), math.nan)
    x, larger = x.requires_grad_(), torch.cat([w, junk]).requires_grad_()
    bias = torch.zeros(39, requires_grad=True)
    loss = distill_loss(x, larger, y, torch.cat([u, junk[:2]]), vocab_size=30, student_bias=bias)
    assert_close(loss.detach(), distill_loss(x.detach(), w, y, u))
    grads = torch.autograd.grad(loss, (x, larger, bias))
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[1][30:] == 0).all()
    assert (grads[2][30:] == 0).all()


def test_nothing_to_count():
    x, w, y, u, _ = problem(3, 30, 8, 8)
    x.requires_grad_()
    loss = distill_loss(x, w, y, u, weights=torch.zeros(3, dtype=torch.bool))
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, x)[0] == 0).all()
    empty = x[:0]
    assert distill_loss(empty, w, y[:0], u).item() == 0
    assert distill_loss(empty, w, y[:0], u, reduction="none").shape == (0,)


def test_only_what_is_trained_gets_gradients():
    x, w, y, u, _ = problem(4, 30, 8, 8)
    y, u, x = y.requires_grad_(), u.requires_grad_(), x.requires_grad_()
    for recompute in (False, True):
        loss = distill_loss(x, w, y, u, recompute=recompute)
        grads = torch.autograd.grad(loss, (x, y, u), allow_unused=True)
        assert grads[0] is not None
        assert grads[1:] == (None, None)
    with torch.no_grad():
        assert not distill_loss(x, w, y, u).requires_grad


def test_second_derivatives_are_refused():
    x, w, y, u, _ = problem(4, 30, 8, 8)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(distill_loss(x, w, y, u), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_autocast():
    x, w, y, u, _ = problem(4, 30, 8, 8)
    x, w = x.requires_grad_(), w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = distill_loss(x, w, y, u)
    half = distill_loss(*(t.bfloat16() for t in (x, w, y, u)))
    assert loss.item() == half.item()
    loss.backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32


def test_operators_are_sound():
    """Schema, fake tensors and gradients of both operators, as torch itself checks them."""
    x, w, y, u, weights = problem(4, 30, 8, 8)
    x, w, bias = x.requires_grad_(), w.requires_grad_(), torch.randn(30, requires_grad=True)
    fixed = ("jsd", 0.5, 1.0, 30, 3)
    torch.library.opcheck(op._losses, (x, w, y, u, weights, bias, None, *fixed))
    torch.library.opcheck(op._losses, (x, w, y @ u.T, None, weights, None, None, *fixed))
    # The gradients among its outputs are not differentiable, which torch's own check of gradients can't be told.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op._kept, (x, w, y, u, weights, bias, None, *fixed, [True] * 3), test_utils=checks)
    torch.library.opcheck(op._kept, (x, w, y, u, weights, None, None, *fixed, [True, False, False]), test_utils=checks)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_break(reduction):
    x, w, y, u, weights = problem(4, 30, 8, 8)
    x, w = x.requires_grad_(), w.requires_grad_()

    def step(x, w):
        return distill_loss(x, w, y, u, weights=weights, divergence="jsd", reduction=reduction).sum()

    expected = step(x, w)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(x, w)
    assert_close(actual.detach(), expected.detach())
    pairs = zip(torch.autograd.grad(actual, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True)
    for ours, wanted in pairs:
        assert_close(ours, wanted)


BAD = [
    ({"student_head": torch.zeros(5, 4)}, r"student_hidden has shape \(2, 3\) and student_head \(5, 4\)"),
    ({"teacher_head": torch.zeros(5)}, r"teacher_hidden has shape \(2, 4\) and teacher_head \(5,\)"),
    ({"teacher_head": torch.zeros(6, 4)}, r"student's vocabulary has 5 entries, the teacher's 6.*vocab_size"),
    ({"vocab_size": 6}, r"vocab_size is 6, the heads have 5 \(student\) and 5 \(teacher\)"),
    ({"student_hidden": torch.zeros(2, 3).half()}, r"student_hidden is torch.float16 and student_head torch.float32"),
    ({"teacher_hidden": torch.zeros(2, 4).double()}, r"teacher_hidden is torch.float64: cast it"),
    ({"teacher_hidden": torch.zeros(3, 4)}, r"student_hidden has shape \(2, 3\), teacher_hidden \(3, 4\)"),
    ({"weights": torch.zeros(3)}, r"weights has shape \(3,\), the rows of student_hidden \(2,\)"),
    ({"weights": torch.zeros(2, dtype=torch.long)}, r"weights is torch.int64: give a bool mask"),
    ({"weights": torch.zeros(2, device="meta")}, r"student_hidden lies on cpu and weights on meta"),
    ({"student_bias": torch.zeros(4)}, r"student_bias has shape \(4,\), its head has 5 rows"),
    ({"teacher_bias": torch.zeros(5, dtype=torch.int)}, r"teacher_bias is torch.int32"),
    ({"divergence": "kl"}, r"divergence is 'kl', not one of forward_kl, reverse_kl, jsd"),
    ({"divergence": "jsd", "beta": 1.0}, r"beta is 1.0.*forward_kl.*reverse_kl"),
    ({"temperature": 0.0}, r"temperature is 0.0: it must be above 0"),
    ({"reduction": "batchmean"}, r"reduction is 'batchmean', not one of mean, sum, none"),
    ({"chunk_rows": 0}, r"chunk_rows is 0"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_input_is_named(wrong, message):
    good = {"student_hidden": torch.zeros(2, 3), "student_head": torch.zeros(5, 3)}
    good |= {"teacher_hidden": torch.zeros(2, 4), "teacher_head": torch.zeros(5, 4)}
    with pytest.raises(ValueError, match=message):
        distill_loss(**(good | wrong))


def test_bad_logits_are_named():
    with pytest.raises(ValueError, match=r"student_hidden has shape \(2, 3\), teacher_logits \(3, 5\)"):
        distill_loss_from_logits(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(3, 5))
