"""The chunked loss against one that holds all logits, for plain heads and for others."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from hf_efficiency.distillation import Job, Objective, OutputHead, chunked_loss, top_k
from hf_efficiency.distillation.fused import fused_loss
from hf_efficiency.distillation.heads import LogitsHead
from hf_efficiency.distillation.teachers import ModelRows
from hf_efficiency.distillation.trace import trace
from tests.families import FAMILIES, build_family

N, D = 13, 32


class Head(OutputHead):
    """A head on its own, in float64."""

    def __init__(self, bias=False, dtype=torch.float64):
        self.module, self.after = torch.nn.Linear(D, 40, bias=bias, dtype=dtype), []


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(N, 48, generator=generator, dtype=torch.float64)
    return hidden, teacher, torch.randint(0, 36, (N,), generator=generator)


def whole(objective, hidden, head, teacher, labels, vocab):
    """alpha T² KL(p ‖ q) + (1 - alpha) cross-entropy, summed, with all logits at once."""
    logits, t = head(hidden)[:, :vocab], objective.temperature
    soft = F.kl_div(
        (logits / t).log_softmax(-1), (teacher[:, :vocab] / t).log_softmax(-1), reduction="sum", log_target=True
    )
    return objective.alpha * t**2 * soft + (1 - objective.alpha) * F.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (0.3, 2.0), (0.0, 1.0)])
def test_equals_the_whole(data, alpha, temperature, rows, bias):
    hidden, teacher, labels = data
    objective = Objective(alpha=alpha, temperature=temperature)
    head, results = Head(bias), []
    for chunked in (False, True):
        x = hidden.clone().requires_grad_()
        head.module.zero_grad()
        if chunked:
            loss, _ = chunked_loss(Job(objective, labels, lambda part: teacher[part], 36, rows), head, x)
        else:
            loss = whole(objective, x, head, teacher, labels, 36)
        (3 * loss).backward()
        results.append([loss.detach().double(), x.grad, *(p.grad for p in head.module.parameters())])
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_agrees_with_the_kernel(data, name):
    """What runs on a GPU, here by Triton's interpreter, with padding that does not count and a bias."""
    hidden, _, labels = data
    heads = [Head(bias=True, dtype=torch.float32) for _ in range(2)]
    heads[1].module.weight.data *= 2
    rows = ModelRows(torch.randn(N, D), heads[1], torch.device("cpu"))
    job = Job(Objective({name: 0.5}, beta=0.3, temperature=2.0), labels, rows, 36, 5)
    grads = []
    for loss_of in (lambda *args: chunked_loss(*args)[0], fused_loss):
        x = hidden.float().requires_grad_()
        loss = loss_of(job, heads[0], x)
        grads.append((loss.detach(), *torch.autograd.grad(loss, [x, *heads[0].module.parameters()])))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_what_the_kernel_leaves_to_others(data):
    hidden, head = data[0].float(), Head(dtype=torch.float32)
    rows = ModelRows(torch.randn(N, D), head, torch.device("cpu"))
    for objective in (Objective("skew_kl"), Objective({"jsd": 1, "reverse_kl": 1}), Objective(alpha=0.5)):
        assert fused_loss(Job(objective, data[2], rows, 40), head, hidden) is None
    assert fused_loss(Job(Objective(), data[2], rows, 40, monitor=True), head, hidden) is None
    assert fused_loss(Job(Objective(), data[2], lambda part: data[1][part], 40), head, hidden) is None
    assert fused_loss(Job(Objective(), data[2], rows, 40), LogitsHead(), hidden) is None


def test_a_cache_in_chunks(data):
    hidden, teacher, labels = data
    kept, head, grads = top_k(teacher[:, :40], 5), Head(), []

    def rows(part):
        return type(kept)(kept.ids[part], kept.log_p[part], kept.log_rest[part])

    for size in (3, 100):
        x = hidden.clone().requires_grad_()
        loss, _ = chunked_loss(Job(Objective(alpha=0.5), labels, rows, 40, size), head, x)
        grads.append((loss.detach(), *torch.autograd.grad(loss, [x, head.module.weight])))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_sums_for_the_log(data):
    hidden, teacher, labels = data
    head = Head()
    job = Job(Objective(temperature=3.0), labels, lambda part: teacher[part, :40], 40, 4, monitor=True)
    with torch.no_grad():
        _, sums = chunked_loss(job, head, hidden)
        log_q = head(hidden).log_softmax(-1)
    log_p = teacher[:, :40].log_softmax(-1)
    assert sums["hard"].item() == pytest.approx(-log_q.gather(-1, labels[:, None]).sum().item())
    assert sums["kl"].item() == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item())
    assert sums["agreement"].item() == (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
    assert sums["acceptance"].item() == pytest.approx(torch.minimum(log_p.exp(), log_q.exp()).sum().item())


def test_backward_once_only(data):
    hidden, teacher, labels = data
    loss, _ = chunked_loss(Job(Objective(), labels, lambda part: teacher[part], 40), Head(), hidden.requires_grad_())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="for one backward pass only"):
        loss.backward()


def test_no_rows_still_reach_every_parameter(data):
    head, hidden = Head(), data[0][:0].requires_grad_()
    loss, sums = chunked_loss(Job(Objective(), data[2][:0], None, 40), head, hidden)
    loss.backward()
    assert loss.item() == 0
    assert not sums
    assert head.module.weight.grad.eq(0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_any_decoder(family):
    """Hidden states through the head taken out give the loss and the gradients of the model's own logits."""
    model, teacher = build_family(family), build_family(family)
    for parameter in teacher.parameters():
        parameter.data *= 1.1
    ids = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(1))
    inputs, labels = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids[:, 1:].reshape(-1)
    target = teacher(**inputs).logits[:, :-1].flatten(0, 1).detach()
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    expected = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True)
    slopes = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    found = trace(model, inputs)
    assert found.logits.shape[1] == 1
    rows = trace(teacher, inputs).hidden[:, :-1].flatten(0, 1).detach()
    job = Job(Objective(), labels, ModelRows(rows, OutputHead(teacher), ids.device), 256, 5)
    loss, _ = chunked_loss(job, OutputHead(model), found.hidden[:, :-1].flatten(0, 1))
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(grads, slopes, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_adapters_on_the_head(targets, tiny_llama):
    model = get_peft_model(tiny_llama, LoraConfig(target_modules=targets, init_lora_weights=False))
    ids = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(1))
    labels, trained = ids[:, 1:].reshape(-1), [p for p in model.parameters() if p.requires_grad]
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    expected = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), trained)
    hidden = trace(model, {"input_ids": ids}).hidden[:, :-1].flatten(0, 1)
    head = OutputHead(model)
    assert head.linear() is None
    loss, _ = chunked_loss(Job(Objective(), labels, None, logits.shape[-1], 5), head, hidden)
    for ours, theirs in zip(torch.autograd.grad(loss, trained), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_logits_that_are_there_already(data):
    _, teacher, labels = data
    z = torch.randn(N, 48, dtype=torch.float64, requires_grad=True)
    loss, _ = chunked_loss(Job(Objective(), labels, lambda part: teacher[part], 40, 4), LogitsHead(), z)
    (grad,) = torch.autograd.grad(loss, z)
    assert grad[:, 40:].eq(0).all()
    torch.testing.assert_close(grad[:, :40], z[:, :40].softmax(-1).detach() - teacher[:, :40].softmax(-1))
