"""AdaLoRA's schedule, scores and masks: numbers by hand, and PEFT's allocator on the same gradients."""

import math

import pytest
import torch
from torch import nn, tensor

from hf_efficiency.adapters.rank_allocation import (
    BudgetSchedule,
    RankAllocator,
    add_orthogonality_gradient,
    orthogonality,
)
from hf_efficiency.adapters.triplet import Directions


def schedule(total=10, tinit=0, tfinal=0, interval=1, first=4, last=2):
    return BudgetSchedule(total, tinit, tfinal, interval, first, last)


def matrix(e, a, b):
    return Directions(*(nn.Parameter(tensor(values)) for values in (e, a, b)))


def random_matrices(ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"m{i}": ((r,), (r, 5), (6, r)) for i, r in enumerate(ranks)}
    return {
        name: Directions(*(nn.Parameter(torch.randn(shape, generator=generator)) for shape in three))
        for name, three in shapes.items()
    }


def set_gradients(matrices, seed):
    generator = torch.Generator().manual_seed(seed)
    for directions in matrices.values():
        for parameter in directions:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_budget_by_hand():
    """Equation 12 with 2 steps before and 3 after: 40 + 60 (1 - (t - 2) / 5)^3."""
    budget = schedule(10, tinit=2, tfinal=3, first=100, last=40).budget
    between = [40 + 60 * (1 - i / 5) ** 3 for i in range(1, 5)]
    assert [budget(t) for t in range(1, 11)] == [100, 100, *map(int, between), 40, 40, 40, 40]


def test_gradient_norm_by_hand():
    """|e| sqrt(de^2 + |da|^2 + |db|^2): 2 * sqrt(1 + 4 + 4) and 3 * sqrt(9 + 16 + 0), times 1 - beta1."""
    directions = matrix([2.0, -3.0], [[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0]])
    directions.e.grad = tensor([1.0, 3.0])
    directions.a.grad = tensor([[2.0, 0.0], [0.0, 4.0]])
    directions.b.grad = tensor([[2.0, 0.0]])
    allocator = RankAllocator({"m": directions}, schedule(), "gradient_norm", beta1=0.5)
    allocator.step(1)
    assert allocator.scores()["m"].tolist() == [3.0, 7.5]
    allocator.step(2)
    assert allocator.scores()["m"].tolist() == [4.5, 11.25]


def test_sensitivity_by_hand():
    """One step with beta1 = beta2 = 1/2: mean is s/2, spread (s - s/2)/2 = s/4, their product s^2/8."""
    directions = matrix([2.0], [[1.0, 3.0]], [[4.0], [0.0]])
    directions.e.grad, directions.a.grad = tensor([2.0]), tensor([[2.0, -2.0]])
    directions.b.grad = tensor([[1.0], [5.0]])
    allocator = RankAllocator({"m": directions}, schedule(first=1, last=1), beta1=0.5, beta2=0.5)
    allocator.step(1)
    # s: e 4; a 2 and 6, mean of the squares 20; b 4 and 0, mean of the squares 8.
    assert allocator.scores()["m"].tolist() == [16 / 8 + 20 / 8 + 8 / 8]


def test_sensitivity_is_what_peft_computes():
    """PEFT's allocator on the same parameters and gradients chooses the same directions at each step."""
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator as PeftAllocator

    class Layer(nn.Module):
        def __init__(self, directions):
            super().__init__()
            e, a, b = (nn.Parameter(p.detach().clone()) for p in directions)
            self.lora_E, self.lora_A, self.lora_B = (nn.ParameterDict({"default": p}) for p in (e[:, None].data, a, b))

    matrices = random_matrices([3, 3, 3])
    theirs = nn.ModuleDict({name: Layer(directions) for name, directions in matrices.items()})
    config = AdaLoraConfig(init_r=3, target_r=1, tinit=2, tfinal=3, total_step=12)
    peft = PeftAllocator(theirs, config, "default")
    ours = RankAllocator(matrices, schedule(12, tinit=2, tfinal=3, first=9, last=3))
    for step in range(1, 9):
        set_gradients(matrices, seed=step)
        for name, directions in matrices.items():
            theirs[name].lora_E["default"].grad = directions.e.grad[:, None].clone()
            theirs[name].lora_A["default"].grad = directions.a.grad.clone()
            theirs[name].lora_B["default"].grad = directions.b.grad.clone()
        pattern = peft.update_and_allocate(theirs, step)[1]
        ours.step(step)
        if pattern is not None:
            kept = {f"{name}.lora_E.default": rows.tolist() for name, rows in ours.kept.items()}
            assert kept == pattern
        for name, directions in matrices.items():
            assert torch.equal(directions.e, theirs[name].lora_E["default"][:, 0])


@pytest.mark.parametrize("importance", ["sensitivity", "gradient_norm", "magnitude"])
def test_ends_exactly_at_the_target(importance):
    """Also with equal scores (zero gradients), which PEFT's threshold would prune together."""
    matrices = random_matrices([4, 4, 4])
    allocator = RankAllocator(matrices, schedule(8, tinit=1, tfinal=2, first=12, last=5), importance)
    for step in range(1, 9):
        set_gradients(matrices, seed=step)
        if step == 3:
            for directions in matrices.values():
                for parameter in directions:
                    parameter.grad = None
        for directions in matrices.values():  # an optimizer's momentum revives what was masked
            directions.e.data += 0.01
        allocator.step(step)
        alive = sum(int((directions.e != 0).sum()) for directions in matrices.values())
        assert alive == (12 if step <= 1 else allocator.schedule.budget(step))
    assert alive == 5


def test_magnitude_keeps_the_largest():
    matrices = {"m": matrix([0.1, -3.0, 2.0, 0.5], [[1.0]] * 4, [[1.0] * 4])}
    allocator = RankAllocator(matrices, schedule(1), "magnitude")
    allocator.step(1)
    assert matrices["m"].e.tolist() == [0.0, -3.0, 2.0, 0.0]


def test_interval_and_early_end():
    matrices = random_matrices([4])
    allocator = RankAllocator(matrices, schedule(100, interval=3), "magnitude")
    for step in (1, 2):
        allocator.step(step)
        assert matrices["m0"].e.all()
    allocator.step(3)
    assert int((matrices["m0"].e != 0).sum()) == 3
    allocator.finish()
    assert int((matrices["m0"].e != 0).sum()) == 2


@pytest.mark.parametrize("importance", ["sensitivity", "gradient_norm", "magnitude"])
def test_state_goes_on_exactly(importance):
    def run(steps, allocator, matrices):
        for step in steps:
            set_gradients(matrices, seed=step)
            allocator.step(step)
        return {name: directions.e.detach().clone() for name, directions in matrices.items()}

    def fresh():
        matrices = random_matrices([4, 4])
        return RankAllocator(matrices, schedule(10, tinit=1, tfinal=2, first=8, last=3), importance), matrices

    whole, matrices = fresh()
    expected = run(range(1, 11), whole, matrices)
    first, matrices = fresh()
    run(range(1, 5), first, matrices)
    second = RankAllocator(matrices, whole.schedule, importance)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    ended = run(range(5, 11), second, matrices)
    for name, e in expected.items():
        assert torch.equal(e, ended[name])


def test_orthogonality_by_hand():
    """|A A^T - I| of rows (1, 0), (1, 1) is sqrt(0 + 1 + 1 + 1); B has orthonormal columns."""
    directions = matrix([1.0, 1.0], [[1.0, 0.0], [1.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]])
    assert orthogonality([directions]).item() == pytest.approx(math.sqrt(3) / 2)


def test_orthogonality_gradient_is_added():
    matrices = random_matrices([3, 2])
    set_gradients(matrices, seed=0)
    factors = [p for directions in matrices.values() for p in (directions.a, directions.b)]
    before = [p.grad.clone() for p in factors]
    e_before = {name: directions.e.grad.clone() for name, directions in matrices.items()}
    wanted = torch.autograd.grad(orthogonality(matrices.values()), factors)
    add_orthogonality_gradient(matrices.values(), 0.5)
    for parameter, old, gradient in zip(factors, before, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, old + 0.5 * gradient)
    for name, directions in matrices.items():
        assert torch.equal(directions.e.grad, e_before[name])
    doubled = [nn.Parameter(p.detach().double()) for p in factors[:2]]
    assert torch.autograd.gradcheck(lambda a, b: orthogonality([Directions(None, a, b)]), doubled)


def test_bad_input():
    with pytest.raises(ValueError, match="tinit=5 and tfinal=5 leave none of 10 training steps"):
        schedule(10, tinit=5, tfinal=5)
    with pytest.raises(ValueError, match="target of 9 directions is above the 4 at the beginning"):
        schedule(first=4, last=9)
    with pytest.raises(ValueError, match="importance='size' must be one of sensitivity, gradient_norm, magnitude"):
        RankAllocator({}, schedule(), "size")
    allocator = RankAllocator(random_matrices([4]), schedule(), "magnitude")
    with pytest.raises(ValueError, match="of another model or config: m0 does not fit"):
        allocator.load_state_dict({"fixed": tensor(False), "kept.m0": tensor([True])})
