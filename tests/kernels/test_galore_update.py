"""GaLore's update: the kernels against their references, and both against the paper, torch and bitsandbytes."""

import pytest
import torch

from hf_efficiency.kernels.galore_update import (
    dequantize_state,
    galore_update_,
    galore_update_8bit_,
    kernel,
    op,
    plan,
    quantize_state,
    reference,
)
from tests.kernels.harness import DTYPES, assert_close, guarded, guards_intact, poisoned

# m, n, r: one element, ranks of no size that tiles like, more than one tile each way, more terms than one step takes
SHAPES = [(1, 1, 1), (3, 17, 2), (70, 33, 5), (40, 130, 66), (300, 20, 7)]
ADAM = (0.9, 0.95, 1e-6, 1 - 0.9**3, 1 - 0.95**3)
HALF_TILES = [(plan.SMALL, 1), (plan.MIDDLE, 4), (plan.MIDDLE, 1), (plan.LARGE, 1)]


def inputs(m, n, r, right, dtype, seed=0):
    """Weight, gradient, projection and the two states, as after some steps."""
    torch.manual_seed(seed)
    weight, grad = (torch.randn(m, n).to(dtype) for _ in range(2))
    projection = (torch.randn(n if right else m, r) / (n if right else m) ** 0.5).to(dtype)
    shape = (m, r) if right else (r, n)
    return weight, grad, projection, 0.3 * torch.randn(shape), 0.1 + torch.rand(shape)


def eight_bit(first, second):
    return [*quantize_state(first, True), *quantize_state(second, False)]


def paper(weight, grad, projection, first, second, step, lr, beta1, beta2, eps, decay, scale, right):
    """Algorithm 2 in float64, written from the paper: new weight and states."""
    w, g, p, m, v = (x.double() for x in (weight, grad, projection, first, second))
    r = torch.einsum("mn,nr->mr", g, p) if right else torch.einsum("mr,mn->rn", p, g)
    m = beta1 * m + (1 - beta1) * r
    v = beta2 * v + (1 - beta2) * r**2
    n = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)) ** 0.5 + eps)
    back = torch.einsum("mr,nr->mn", n, p) if right else torch.einsum("mr,rn->mn", p, n)
    return w * (1 - lr * decay) - lr * scale * back, m, v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_kernel(m, n, r, right, dtype):
    weight, grad, p, first, second = map(guarded, inputs(m, n, r, right, dtype))
    expected = [x.clone() for x in (weight, first, second)]
    with poisoned():
        step = kernel.low_rank_step(grad, p, first, second, *ADAM, right)
        kernel.apply_step_(weight, p, step, 0.9, 0.7, right)
    wanted = reference.low_rank_step(grad, p, *expected[1:], *ADAM, right)
    reference.apply_step_(expected[0], p, step, 0.9, 0.7, right)
    assert_close(step, wanted)
    for actual, other in zip((weight, first, second), expected, strict=True):
        assert_close(actual, other)
    assert all(map(guards_intact, (weight, grad, p, first, second)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_kernel_8bit(m, n, r, right, dtype):
    _, grad, p, first, second = inputs(m, n, r, right, dtype)
    grad, p = guarded(grad), guarded(p)
    states = [guarded(x) for x in eight_bit(first, second)]
    expected = [x.clone() for x in states]
    with poisoned():
        step = kernel.low_rank_step_8bit(grad, p, *states, *ADAM, right)
    assert_close(step, reference.low_rank_step_8bit(grad, p, *expected, *ADAM, right))
    assert_same_states(states, expected)
    assert all(map(guards_intact, (grad, p, *states)))


def assert_same_states(actual, expected):
    """Scales alike, and codes but for a few that lay half way between two."""
    for codes, others in ((actual[0], expected[0]), (actual[2], expected[2])):
        difference = (codes.int() - others.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).sum() <= 1 + codes.numel() // 200
    assert_close(actual[1], expected[1])
    assert_close(actual[3], expected[3])


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize(("tile", "parts"), HALF_TILES)
def test_every_tile(monkeypatch, tile, parts, right):
    """The large shapes' launches at a size that the interpreter bears, with more tiles than one each way."""
    monkeypatch.setattr(plan, "plan_project", lambda *_: (tile, parts))
    monkeypatch.setattr(plan, "plan_apply", lambda *_: tile)
    m, n = (150, 300) if right else (300, 270)
    weight, grad, p, first, second = inputs(m, n, 135, right, torch.bfloat16)
    states = eight_bit(first, second)
    wanted, quantized = [x.clone() for x in (weight, first, second)], [x.clone() for x in states]
    with poisoned():
        step = kernel.low_rank_step(grad, p, first, second, *ADAM, right)
        step_8bit = kernel.low_rank_step_8bit(grad, p, *states, *ADAM, right)
        kernel.apply_step_(weight, p, step, 0.9, 0.7, right)
    assert_close(step, reference.low_rank_step(grad, p, *wanted[1:], *ADAM, right))
    assert_close(step_8bit, reference.low_rank_step_8bit(grad, p, *quantized, *ADAM, right))
    reference.apply_step_(wanted[0], p, step, 0.9, 0.7, right)
    for actual, other in zip((weight, first, second), wanted, strict=True):
        assert_close(actual, other)
    assert_same_states(states, quantized)


def test_plans_fill_the_device():
    """On 132 processors: parts only where R has few tiles, the large tile only where it has many."""
    assert plan.plan_project(128, 4096, 4096, 2, 132) == (plan.MIDDLE, plan.PARTS)
    assert plan.plan_project(128, 14336, 4096, 2, 132) == (plan.MIDDLE, 1)
    assert plan.plan_project(4096, 32, 4096, 2, 132) == (plan.MIDDLE, plan.PARTS)
    assert plan.plan_project(1024, 4096, 4096, 2, 132) == (plan.LARGE, 1)
    assert plan.plan_project(1024, 4096, 4096, 4, 132) == (plan.FLOAT32, 1)
    assert plan.plan_project(16, 16, 100, 2, 132) == (plan.MIDDLE, 1)
    assert plan.plan_apply(512, 1376, 128, 2, 132) == plan.SMALL
    assert plan.plan_apply(4096, 4096, 128, 2, 132) == plan.MIDDLE
    assert plan.plan_apply(4096, 4096, 256, 2, 132) == plan.LARGE


@pytest.mark.parametrize("right", [False, True])
def test_strided_inputs(right):
    """Transposed and sliced matrices are read and written where they lie."""
    weight, grad, p, first, second = inputs(20, 37, 6, right, torch.float32)
    wide = torch.zeros(37, 40)
    strided, grad_t, p_t = wide[:, ::2].T, grad.T.contiguous().T, p.T.contiguous().T
    strided.copy_(weight)
    expected = [x.clone() for x in (weight, first, second)]
    step = kernel.low_rank_step(grad_t, p_t, first, second, *ADAM, right)
    kernel.apply_step_(strided, p_t, step, 0.9, 0.7, right)
    wanted = reference.low_rank_step(grad, p, *expected[1:], *ADAM, right)
    reference.apply_step_(expected[0], p, wanted, 0.9, 0.7, right)
    assert_close(step, wanted)
    assert_close(strided, expected[0])
    assert not wide[:, 1::2].any()


@pytest.mark.parametrize("function", ["kernel", "reference"])
def test_nothing_to_do(function):
    """No rows, no columns, no rank: states of nothing stay so, and the weight still decays."""
    module = {"kernel": kernel, "reference": reference}[function]
    for m, n, r in ((0, 5, 0), (5, 0, 3), (4, 5, 0)):
        weight, grad, p, first, second = inputs(m, n, r, False, torch.float32)
        before = weight.clone()
        step = module.low_rank_step(grad, p, first, second, *ADAM, False)
        states = eight_bit(first, second)
        assert step.shape == (r, n)
        assert module.low_rank_step_8bit(grad, p, *states, *ADAM, False).shape == (r, n)
        module.apply_step_(weight, p, step, 0.5, 1.0, False)
        assert torch.equal(weight, before / 2)
    weight, grad, p, first, second = inputs(0, 5, 2, False, torch.float32)
    expected = 0.9 * first
    module.low_rank_step(grad, p, first, second, *ADAM, False)
    assert_close(first, expected)  # a gradient without rows is zero


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_follows_the_paper(side, dtype):
    weight, _, p, first, second = inputs(12, 19, 4, side == "right", dtype)
    rates = {"lr": 0.3, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.1, "scale": 0.6}
    first.zero_(), second.zero_()
    for step in (1, 2, 3):
        grad = torch.randn(12, 19).to(dtype)
        wanted = paper(weight, grad, p, first, second, step, *rates.values(), side == "right")
        before = weight.clone()
        galore_update_(weight, grad, p, first, second, step=step, side=side, **rates)
        assert_close(weight, wanted[0].to(dtype))
        if dtype == torch.float32:  # what was subtracted, too
            assert_close(weight - before, (wanted[0] - before).float(), 1e-4)
        assert_close(first, wanted[1].float())
        assert_close(second, wanted[2].float())


@pytest.mark.parametrize("function", ["kernel", "reference"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_full_rank_is_adamw(monkeypatch, side, function):
    """With the identity for a projection and a scale of 1 there is nothing left of GaLore."""
    if function == "reference":
        monkeypatch.setenv("HF_EFFICIENCY_KERNELS", "reference")
    weight = torch.nn.Parameter(torch.randn(9, 14))
    other = torch.nn.Parameter(weight.detach().clone())
    adamw = torch.optim.AdamW([other], lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    p = torch.eye(9 if side == "left" else 14)
    first, second = torch.zeros(9, 14), torch.zeros(9, 14)
    rates = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.2, "scale": 1.0}
    for step in range(1, 6):
        other.grad = torch.randn(9, 14)
        adamw.step()
        galore_update_(weight, other.grad, p, first, second, step=step, side=side, **rates)
        assert_close(weight.detach(), other.detach())


@pytest.mark.parametrize("signed", [False, True])
def test_dynamic_map_is_that_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    values = reference.dynamic_map(signed)
    assert torch.allclose(values, functional.create_dynamic_map(signed), rtol=1e-6, atol=0)
    x = torch.randn(3, 200) if signed else torch.rand(3, 200) ** 4
    codes, absmax = quantize_state(x, signed)
    theirs, state = functional.quantize_blockwise(x, code=values, blocksize=256)
    assert torch.equal(absmax, state.absmax)
    restored = dequantize_state(codes, absmax, signed)
    assert_close(restored, functional.dequantize_blockwise(codes, absmax=absmax, code=values, blocksize=256))
    # never further from x than theirs
    error = (restored - x).abs() - (functional.dequantize_blockwise(theirs, state) - x).abs()
    assert error.max() <= 1e-7


def test_dynamic_map_by_hand():
    """The values next to zero and one, from the definition in the paper."""
    signed, unsigned = reference.dynamic_map(True), reference.dynamic_map(False)
    assert signed.tolist()[126:130] == pytest.approx([-5.5e-7, 0, 5.5e-7, 3.25e-6])
    assert signed.tolist()[-2:] == pytest.approx([1 - 0.45 / 64, 1])
    assert unsigned.tolist()[:4] == pytest.approx([0, 3.25e-7, 7.75e-7, 2.125e-6])
    assert signed[0] == pytest.approx(-1 + 0.45 / 64)


@pytest.mark.parametrize("signed", [False, True])
def test_kernel_rounds_to_the_nearest_code(signed):
    """Codes and values by arithmetic, against the table: all decades, both ends, zeros, and scales near the smallest.

    With β = 0 a state is R (or R²) itself, and R the gradient.
    """
    x = 10 ** (torch.rand(24, 256) * 8.5 - 8.5) * torch.randn(24, 256).sign()
    x[0], x[1], x[2] = 0, x[1] / 2e19, 1
    x[3:5, 0] = torch.tensor([1.0, -1.0])
    x[5] = torch.cat([reference.dynamic_map(signed)[1:].abs().sqrt(), torch.ones(1)])
    states = eight_bit(torch.randn(24, 256), torch.rand(24, 256))
    kernel.low_rank_step_8bit(x, torch.eye(24), *states, 0.0, 0.0, 1e-8, 1.0, 1.0, False)
    codes, absmax = states[:2] if signed else states[2:]
    wanted, scales = quantize_state(x if signed else x * x, signed)
    assert torch.equal(absmax, scales)
    assert (codes != wanted).sum() <= 5
    assert (codes.int() - wanted.int()).abs().max() <= 1


def test_every_code_means_its_value():
    """With β close to 1 and no gradient, M is the old state: its N is what the kernel read."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    one, zero = torch.ones(1), torch.zeros(1)
    beta = 1 - 2**-24
    for signed in (True, False):
        # N = M / 1 for the signed map, 1 / sqrt(V) for the unsigned one
        first = (codes, one) if signed else (torch.full_like(codes, 255), one)
        second = (torch.zeros_like(codes), zero) if signed else (codes, one)
        states = [x.clone() for x in (*first, *second)]
        grad, p = torch.zeros(1, 256), torch.ones(1, 1)
        step = kernel.low_rank_step_8bit(grad, p, *states, beta, beta, 1.0 if signed else 1e-4, 1.0, 1.0, False)
        values = reference.dynamic_map(signed).view(1, 256)
        wanted = values if signed else 1 / (values.sqrt() + 1e-4)
        assert torch.allclose(step, wanted, rtol=1e-6, atol=0)
        assert torch.equal(states[0 if signed else 2], codes)


@pytest.mark.parametrize("side", ["left", "right"])
def test_8bit_stays_near_32bit(side):
    """Several steps from states of zeros. The first is exact; after it, as near as the codes are."""
    weight, _, p, first, second = inputs(24, 40, 8, side == "right", torch.float32)
    first.zero_(), second.zero_()
    blocks = -(-first.numel() // 256)
    states = [torch.zeros_like(first, dtype=torch.uint8), torch.zeros(blocks)]
    states += [x.clone() for x in states]
    other = weight.clone()
    for step in range(1, 5):
        grad = torch.randn(24, 40)
        galore_update_(weight, grad, p, first, second, step=step, lr=0.1, eps=1e-3, side=side)
        galore_update_8bit_(other, grad, p, *states, step=step, lr=0.1, eps=1e-3, side=side)
        assert_close(other, weight, 1e-5 if step == 1 else 1e-2)
        # a part is at most 0.9 / 2 of the block's scale wide in its decade; half of one a step adds up
        for codes, absmax, state, signed in ((*states[:2], first, True), (*states[2:], second, False)):
            assert_close(dequantize_state(codes, absmax, signed), state, 0.02 * step)


def test_operators_are_sound():
    """Schema, mutations and fake tensors of both operators, as torch itself checks them."""
    weight, grad, p, first, second = inputs(5, 6, 2, False, torch.float32)
    numbers = (2, torch.tensor(0.1), 0.9, 0.99, 1e-8, 0.01, 0.25, False)
    torch.library.opcheck(op._galore_update_, (weight, grad, p, first, second, *numbers))
    torch.library.opcheck(op._galore_update_8bit_, (weight, grad, p, *eight_bit(first, second), *numbers))


def test_one_compilation_serves_all_steps():
    """`torch.compile` traces through, on parameters too; a new step or learning rate does not compile again."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, example_inputs)

    @torch.compile(fullgraph=True, backend=backend)
    def update(weight, grad, p, first, second, states, step, lr):
        galore_update_(weight, grad, p, first, second, step=step, lr=lr, side="right")
        galore_update_8bit_(weight, grad, p, *states, step=step, lr=lr, side="right")

    weight, grad, p, first, second = inputs(5, 6, 2, True, torch.float32)
    states = eight_bit(first, second)
    expected = [x.clone() for x in (weight, first, second, *states)]
    weight = torch.nn.Parameter(weight)
    for step in range(1, 7):
        lr = torch.tensor(0.1 / step)
        update(weight, grad, p, first, second, states, step, lr)
        galore_update_(expected[0], grad, p, *expected[1:3], step=step, lr=lr, side="right")
        galore_update_8bit_(expected[0], grad, p, *expected[3:], step=step, lr=lr, side="right")
    for actual, wanted in zip((weight.detach(), first, second, *states), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert len(graphs) == 2  # the first step, then one that takes any


def test_bad_input_is_named():
    weight, grad, p, first, second = inputs(5, 6, 2, False, torch.float32)
    codes = eight_bit(first, second)

    def update(weight=weight, grad=grad, p=p, first=first, second=second, step=1, **rates):
        galore_update_(weight, grad, p, first, second, step=step, lr=0.1, **rates)

    def update_8bit(*states):
        galore_update_8bit_(weight, grad, p, *states, step=1, lr=0.1)

    for message, call in {
        r"weight is torch.float64: cast it": lambda: update(weight=weight.double()),
        r"weight has shape \(5, 6\) and grad \(6, 5\)": lambda: update(grad=grad.T),
        r"weight has shape \(30,\)": lambda: update(weight=weight.view(-1), grad=grad.view(-1)),
        r"side is 'top'": lambda: update(side="top"),
        r"projection has shape \(5, 2\); on the right of a weight \(5, 6\) it must be \(6, r\)": lambda: update(
            side="right"
        ),
        r"grad is torch.bfloat16 and weight torch.float32": lambda: update(grad=grad.bfloat16()),
        r"projection is torch.float16 and weight torch.float32": lambda: update(p=p.half()),
        r"projection lies on meta and weight on cpu": lambda: update(p=p.to("meta")),
        r"exp_avg is torch.float32 of shape \(6, 2\); torch.float32 of \(2, 6\)": lambda: update(first=first.T),
        r"exp_avg_sq is torch.bfloat16": lambda: update(second=second.bfloat16()),
        r"exp_avg_sq lies on meta and weight on cpu": lambda: update(second=second.to("meta")),
        r"exp_avg has strides \(1, 2\)": lambda: update(first=first.T.contiguous().T),
        r"step is 0: the first one is 1": lambda: update(step=0),
        r"lr has shape \(2,\) on cpu": lambda: galore_update_(
            *inputs(5, 6, 2, False, DTYPES[0]), step=1, lr=first[0, :2]
        ),
        r"beta1 is 0.9 and beta2 1.0": lambda: update(beta2=1.0),
        r"eps is -1": lambda: update(eps=-1),
        r"exp_avg is torch.float32 of shape \(2, 6\); torch.uint8": lambda: update_8bit(first, *codes[1:]),
        r"exp_avg_sq_absmax is torch.float32 of shape \(2,\); torch.float32 of \(1,\)": lambda: update_8bit(
            *codes[:3], torch.zeros(2)
        ),
        r"codes are torch.float32": lambda: dequantize_state(first, codes[1], True),
        r"absmax has shape \(2,\); codes \(2, 6\) need \(1,\)": lambda: dequantize_state(
            codes[0], torch.zeros(2), True
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
