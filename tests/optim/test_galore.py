"""GaLoreAdamW: steps worked out by hand, bytes by formula, states that survive saving, and bad input."""

import copy
import gc
import io
import math
import weakref

import pytest
import torch

from hf_efficiency.optim import GaLoreAdamW, GaLoreOptions, formula_bytes, optimizer_bytes, variant_options
from hf_efficiency.optim.projection import random_basis

ROWS = {
    "power": {"rank": 4},
    "svd": {"rank": 4, "projection": "svd"},
    "randomized": {"rank": 4, "projection": "randomized"},
    "random": {"rank": 4, "projection": "random"},
    "8-bit": {"rank": 4, "state_bits": 8},
    "int8": {"rank": 4, "projection_bits": 8},
    "q-galore": {"rank": 4, "state_bits": 8, "projection_bits": 4, "lazy_threshold": 0.4, "lazy_patience": 1},
    "apollo": {"rank": 4, "projection": "random", "update": "channel"},
    "apollo-mini": {"rank": 1, "projection": "random", "update": "tensor"},
    "reverse": {"rank": 4, "side": "right"},
}


def parameter(values, dtype=torch.float32):
    return torch.nn.Parameter(torch.as_tensor(values, dtype=dtype))


def make_weights(dtype=torch.float32):
    """A tall and a wide matrix, a square one whose elements fill no whole block, and a vector."""
    draw = torch.Generator().manual_seed(0)
    shapes = (48, 24), (16, 40), (17, 17), (24,)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in shapes]


def make_optimizer(weights, **options):
    rank, update_proj_gap = options.pop("rank"), options.pop("update_proj_gap", 2)
    groups = [{"params": weights[:3], "rank": rank}, {"params": weights[3:], "weight_decay": 0.0}]
    return GaLoreAdamW(groups, lr=0.05, weight_decay=0.1, update_proj_gap=update_proj_gap, **options)


def run(optimizer, weights, steps, first=0):
    for step in range(first, first + steps):
        draw = torch.Generator().manual_seed(100 + step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=draw).to(weight.dtype)
        optimizer.step()


@pytest.mark.parametrize("projection", ["svd", "randomized", "power"])
@pytest.mark.parametrize("wide", [False, True])
def test_two_steps_by_hand(projection, wide):
    """G1 has the singular values 3 and 1 along the axes: of rank 1, only its first column counts.

    Step 1: R = (3, 0, 0), N = (1, 0, 0). Step 2, of G2 = ((1, 2), 0, 0): R = (1, 0, 0), M = .37, V = .009991, so
    N = (.37 / .19) / sqrt(.009991 / .001999) = .871065. Each step is lr α = .05 of N, after a decay of 1 - lr λ = .99.
    """
    first, second = torch.zeros(3, 2), torch.zeros(3, 2)
    first[0, 0], first[1, 1] = 3, 1
    second[0] = torch.tensor([1.0, 2.0])
    expected_first, expected_second = torch.full((3, 2), 0.99), torch.full((3, 2), 0.99**2)
    expected_first[0, 0] -= 0.05
    expected_second[0, 0] -= 0.05 * 0.99 + 0.05 * 0.871065
    turn = (lambda x: x.T.contiguous()) if wide else (lambda x: x)
    weight = parameter(turn(torch.ones(3, 2)))
    optimizer = GaLoreAdamW(
        [{"params": [weight], "rank": 1}], lr=0.1, eps=1e-5, scale=0.5, weight_decay=0.1, projection=projection
    )
    for gradient, expected in ((first, expected_first), (second, expected_second)):
        weight.grad = turn(gradient)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), turn(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("update", ["channel", "tensor"])
def test_first_step_of_apollo_by_hand(update):
    """Adam's first direction is the sign of R: its norm is sqrt(r) in a channel and sqrt(r n) in all."""
    weight, gradient = parameter(torch.zeros(6, 9)), torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    options = {"projection": "random", "update": update, "scale": 2.0}
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 4}], lr=0.1, **options)
    weight.grad = gradient
    optimizer.step()
    low = random_basis((6, 4), optimizer.state[weight]["seed"], gradient).T @ gradient
    if update == "channel":
        expected = gradient * (math.sqrt(4) / low.norm(dim=0))
    else:
        expected = gradient * (math.sqrt(4 * 9) / low.norm())
    torch.testing.assert_close(weight.detach(), -0.2 * expected, rtol=1e-5, atol=1e-6)


def test_apollo_bounds_the_growth_of_an_update():
    weight = parameter(torch.zeros(8, 12))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 2}], lr=1.0, projection="random", update="channel", scale=1.0)
    norms = []
    for sign in (1.0, -1.0, -1.0, -1.0):  # the second step all but stops, the third would leap
        before = weight.detach().clone()
        weight.grad = sign * torch.randn(8, 12, generator=torch.Generator().manual_seed(3))
        optimizer.step()
        norms.append((weight.detach() - before).norm().item())
    assert norms[1] < 0.1 * norms[0]
    assert norms[2] / norms[1] == pytest.approx(1.01, rel=1e-4)
    assert norms[3] / norms[2] == pytest.approx(1.01, rel=1e-4)


def test_at_full_rank_two_bases_agree_on_the_first_direction_of_a_diagonal_gradient():
    """With G diagonal the full basis are the axes, and GaLore at α = 1 is AdamW."""
    weights = [parameter(torch.ones(4, 4)) for _ in range(2)]
    ours = GaLoreAdamW([{"params": weights[:1], "rank": 4}], lr=0.1, scale=1.0, projection="svd", weight_decay=0.1)
    torchs = torch.optim.AdamW(weights[1:], lr=0.1, weight_decay=0.1)
    for step in range(1, 4):
        for weight in weights:
            weight.grad = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])) * step
        ours.step()
        torchs.step()
    torch.testing.assert_close(weights[0], weights[1])


@pytest.mark.parametrize("bits", [32, 8])
def test_without_a_rank_it_is_adamw(bits):
    """To rounding in 32 bits; with 8-bit moments the weights stay near."""
    ours, theirs = [[parameter(torch.linspace(-1, 1, 6000).view(60, 100)), parameter(torch.ones(5))] for _ in range(2)]
    optimizers = GaLoreAdamW(ours, lr=0.01, weight_decay=0.1, state_bits=bits), torch.optim.AdamW(theirs, 0.01)
    optimizers[1].param_groups[0]["weight_decay"] = 0.1
    for optimizer, weights in zip(optimizers, (ours, theirs), strict=True):
        run(optimizer, weights, steps=5)
    moved = (theirs[0] - torch.linspace(-1, 1, 6000).view(60, 100)).norm()
    assert (ours[0] - theirs[0]).norm() / moved < (1e-5 if bits == 32 else 0.05)
    torch.testing.assert_close(ours[1], theirs[1])
    assert (optimizers[0].state[ours[0]]["exp_avg"].dtype == torch.uint8) == (bits == 8)


def test_eight_bit_part_by_part(monkeypatch):
    """Where a parameter is cut changes nothing."""
    from hf_efficiency.optim import moments

    weights = [parameter(torch.linspace(-1, 1, 5000)) for _ in range(2)]
    for weight, chunk in zip(weights, (1024, 2**20), strict=True):
        monkeypatch.setattr(moments, "_CHUNK", chunk)
        run(GaLoreAdamW([weight], lr=0.01, state_bits=8), [weight], steps=3)
    assert torch.equal(*weights)


@pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bytes_are_those_of_the_formula(options, dtype):
    weights = make_weights(dtype)
    optimizer = make_optimizer(weights, **options)
    run(optimizer, weights, steps=3)
    assert optimizer_bytes(optimizer) == formula_bytes(optimizer.param_groups)
    assert all(bool(weight.isfinite().all()) for weight in weights)


def test_formula_by_hand():
    """Rank 4 of (48, 24), projected on the right: P is (24, 4), both moments (48, 4); (16, 40) on the left."""
    weights = make_weights()
    optimizer = make_optimizer(weights, rank=4)
    tall, wide = 4 * (24 * 4 + 2 * 48 * 4), 4 * (16 * 4 + 2 * 40 * 4)
    square, vector = 4 * (17 * 4 + 2 * 17 * 4), 4 * 2 * 24
    assert formula_bytes(optimizer.param_groups) == tall + wide + square + vector
    small = make_optimizer(make_weights(), rank=4, state_bits=8, projection_bits=4)
    tall, wide = 48 + 8 + 2 * (192 + 4), 32 + 8 + 2 * (160 + 4)
    square = 34 + 8 + 2 * (68 + 4)
    assert formula_bytes(small.param_groups) == tall + wide + square + vector


def test_eight_bit_states_take_less_than_a_third():
    moments = {}
    for bits in (32, 8):
        weight = parameter(torch.randn(128, 256))
        optimizer = GaLoreAdamW([{"params": [weight], "rank": 16}], state_bits=bits)
        run(optimizer, [weight], steps=1)
        state = optimizer.state[weight]
        moments[bits] = sum(state[name].nbytes for name in state if name.startswith("exp_avg"))
    assert moments[8] < moments[32] / 3


@pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_goes_on_to_the_same_bit_after_saving(options, dtype):
    straight = make_weights(dtype)
    run(make_optimizer(straight, **options), straight, steps=7)
    weights = make_weights(dtype)
    optimizer = make_optimizer(weights, **options)
    run(optimizer, weights, steps=3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    fresh = make_optimizer(resumed, **options)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    run(fresh, resumed, steps=4, first=3)
    for weight, expected in zip(resumed, straight, strict=True):
        assert torch.equal(weight, expected)
    run(optimizer, weights, steps=1, first=3)  # the loaded state is a copy
    assert fresh.state[resumed[0]]["step"] == 7


@pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)
def test_learns(options):
    """A regression whose loss falls to less than a half, in every row."""
    draw = torch.Generator().manual_seed(0)
    x, target = torch.randn(64, 24, generator=draw), torch.randn(24, 40, generator=draw)
    weight = parameter(torch.zeros(24, 40))
    rank = options["rank"] * 2 if options["rank"] > 1 else 1
    scale = 1.0 if "update" in options else 0.25
    optimizer = GaLoreAdamW([weight], lr=0.1, update_proj_gap=10, **{**options, "rank": rank, "scale": scale})
    losses = []
    for _ in range(80):
        loss = (x @ (weight - target)).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


def test_moments_of_a_bfloat16_weight_are_float32():
    weights = make_weights(torch.bfloat16)
    optimizer = make_optimizer(weights, rank=4)
    run(optimizer, weights, steps=1)
    assert optimizer.state[weights[0]]["exp_avg_sq"].dtype == torch.float32
    assert optimizer.state[weights[3]]["exp_avg_sq"].dtype == torch.float32
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[weights[0]]["exp_avg_sq"].dtype == torch.float32
    assert optimizer.state[weights[0]]["projection"].dtype == torch.bfloat16


def test_subspace_is_refreshed_every_gap_steps():
    weights = make_weights()
    optimizer = make_optimizer(weights, rank=4, update_proj_gap=3)
    changes, before = [], None
    for step in range(7):
        run(optimizer, weights, steps=1, first=step)
        basis = optimizer.state[weights[0]]["projection"]
        if before is not None and not torch.equal(before, basis):
            changes.append(step)
        before = basis.clone()
    assert changes == [3, 6]


def test_lazy_update_doubles_the_gap_where_the_subspace_stays():
    """A gradient that is always the same is refreshed at steps 0, 2, 4, then every 4, then every 8."""
    weight, gradient = parameter(torch.zeros(12, 12)), torch.randn(12, 12, generator=torch.Generator().manual_seed(2))
    options = {"projection": "svd", "projection_bits": 4, "lazy_threshold": 0.9, "lazy_patience": 2}
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 3}], update_proj_gap=2, **options)
    due = []
    for step in range(24):
        state = optimizer.state[weight]
        if state.get("refresh_at", 0) == step:
            due.append(step)
        weight.grad = gradient
        optimizer.step()
    assert due == [0, 2, 4, 8, 12, 20]


def test_lazy_update_leaves_moving_subspaces_alone():
    weights = make_weights()
    options = {"projection": "svd", "lazy_threshold": 0.9, "lazy_patience": 1}
    optimizer = make_optimizer(weights, rank=4, **options)
    run(optimizer, weights, steps=9)
    assert [optimizer.state[weight]["gap"] for weight in weights[:3]] == [2, 2, 2]


@pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)
def test_update_during_backward_equals_the_ordinary_step(options):
    def losses_of(per_layer):
        weights = make_weights()
        optimizer = make_optimizer(weights, per_layer=per_layer, **options)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        x = torch.randn(5, 48, generator=torch.Generator().manual_seed(9))
        for _ in range(5):
            hidden = (x @ weights[0] + weights[3]).tanh()
            loss = hidden.square().sum() + (weights[1] @ weights[1].T).sum() + (weights[2] @ weights[2]).sum()
            loss.backward()
            if per_layer:
                assert all(weight.grad is None for weight in weights)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return weights

    for weight, expected in zip(losses_of(True), losses_of(False), strict=True):
        assert torch.equal(weight, expected)


def test_update_during_backward_ends_with_its_hooks_or_its_optimizer():
    weight = parameter(torch.ones(4, 4))
    optimizer = GaLoreAdamW([weight], rank=2, per_layer=True)
    optimizer.remove_hooks()
    weight.sum().backward()
    assert weight.grad is not None
    weight.grad = None
    optimizer = GaLoreAdamW([weight], rank=2, per_layer=True)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    weight.sum().backward()
    assert torch.equal(weight.detach(), torch.ones(4, 4))


def test_update_during_backward_refuses_gradient_accumulation():
    weight = parameter(torch.ones(4, 4))
    optimizer = GaLoreAdamW([weight], rank=2, per_layer=True)
    weight.square().sum().backward()
    with pytest.raises(RuntimeError, match=r"not go with gradient accumulation. Set gradient_accumulation_steps"):
        weight.square().sum().backward()
    optimizer.step()
    weight.square().sum().backward()


def test_update_during_backward_refuses_several_processes(monkeypatch):
    monkeypatch.setattr("hf_efficiency.optim.galore._processes", lambda: 2)
    with pytest.raises(ValueError, match="per_layer=True updates weights before the gradients of all processes"):
        GaLoreAdamW(make_weights(), per_layer=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["power", "8-bit", "reverse"])
def test_the_kernel_does_the_same(name, dtype, monkeypatch):
    """Interpreted in float32; its reference in bfloat16, which Triton's interpreter cuts off where it should round."""
    if dtype == torch.bfloat16:
        monkeypatch.setenv("HF_EFFICIENCY_KERNELS", "reference")
    start, plain, through_kernel = (make_weights(dtype) for _ in range(3))
    run(make_optimizer(plain, **ROWS[name]), plain, steps=4)
    monkeypatch.setattr("hf_efficiency.optim.low_rank._has_kernel", lambda weight: True)
    run(make_optimizer(through_kernel, **ROWS[name]), through_kernel, steps=4)
    for weight, expected, before in zip(through_kernel, plain, start, strict=True):
        error = (weight - expected).float().norm() / (expected - before).float().norm()
        assert error < (0.02 if name == "8-bit" else 1e-4)


def test_step_takes_a_closure():
    weight = parameter(torch.ones(4, 4))
    optimizer = GaLoreAdamW([weight], rank=2)

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 16


def test_weights_of_any_strides():
    weights = [parameter(torch.ones(24, 16)), torch.nn.Parameter(torch.ones(16, 24).T)]
    for weight in weights:
        optimizer = GaLoreAdamW([{"params": [weight], "rank": 4}], lr=0.1)
        run(optimizer, [weight], steps=3)
    torch.testing.assert_close(*weights)
    dense = [parameter(torch.ones(80, 60)), torch.nn.Parameter(torch.ones(60, 80).T)]
    for weight in dense:
        run(GaLoreAdamW([weight], lr=0.1, state_bits=8), [weight], steps=3)
    torch.testing.assert_close(*dense)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        (
            {"rank": 25},
            r"rank=25 is above 24, all the rank that a weight of shape \(48, 24\) can have: choose",
        ),
        ({"rank": 4, "update_proj_gap": 0}, "update_proj_gap=0 must be at least 1"),
        ({"rank": 4, "scale": 0.0}, "scale=0.0 must be a positive number"),
        ({"rank": 4, "projection": "pca"}, "projection='pca' is unknown: choose one of 'power', 'randomized'"),
        ({"rank": 4, "side": "top"}, "side='top' is unknown: choose one of 'auto', 'left', 'right'"),
        ({"rank": 4, "update": "row"}, "update='row' is unknown"),
        ({"rank": 4, "state_bits": 4}, "state_bits=4 is unknown: choose one of 32, 8"),
        ({"rank": 4, "projection_bits": 2}, "projection_bits=2 is unknown: choose one of None, 8, 4"),
        ({"rank": 4, "lazy_threshold": 1.5}, r"lazy_threshold=1.5 must lie in \(0, 1\]"),
        ({"rank": 4, "growth_limit": 0.9}, "growth_limit=0.9 must be above 1"),
        ({"rank": 4, "projection": "random", "projection_bits": 4}, "projection='random' keeps a seed"),
        ({"rank": 4, "proj_gap": 3}, "has no option 'proj_gap'. Did you mean 'update_proj_gap'?"),
        ({"rank": 4, "proj_type": "std"}, "has no option 'proj_type'. Did you mean 'side'?"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([{"params": make_weights()[:3], **options}])


def test_bad_arguments():
    weights = make_weights()
    with pytest.raises(TypeError, match=r"rank=4.0 must be an integer"):
        GaLoreAdamW(weights[:3], rank=4.0)
    with pytest.raises(ValueError, match=r"A weight of shape \(24,\) is no matrix: put it into a group with rank=None"):
        GaLoreAdamW(weights, rank=4)
    with pytest.raises(ValueError, match=r"The weight 'k_proj' of shape .* is no matrix"):
        GaLoreAdamW([{"params": [("k_proj", weights[3])], "rank": 4}])
    with pytest.raises(ValueError, match=r"betas=\(0.9, 1.0\) must both lie in"):
        GaLoreAdamW(weights, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"lr=-1.0 can't be negative"):
        GaLoreAdamW(weights, lr=-1.0)
    with pytest.raises(ValueError, match=r"has no option 'ranks'. Did you mean 'rank'"):
        GaLoreAdamW(weights, ranks=4)
    with pytest.raises(ValueError, match="variant='galora' is unknown: choose one of galore, galore-8bit"):
        variant_options("galora")
    codes = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="quantized or integer weight can't be trained"):
        GaLoreAdamW([codes])
    optimizer = GaLoreAdamW(weights[:2], rank=4)
    with pytest.raises(ValueError, match="rank=40 is above 17"):
        optimizer.add_param_group({"params": weights[2:3], "rank": 40})
    assert len(optimizer.param_groups) == 1


def test_gradients_that_are_not_finite_are_refused_when_a_subspace_is_due():
    weight = parameter(torch.ones(4, 4))
    optimizer = GaLoreAdamW([weight], rank=2)
    weight.grad = torch.full((4, 4), torch.nan)
    with pytest.raises(ValueError, match="has NaN or infinite elements at its step 0"):
        optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(4, 4))


def test_zero_gradient_changes_nothing():
    weight = parameter(torch.ones(6, 4))
    optimizer = GaLoreAdamW([weight], rank=2, update_proj_gap=1)
    for _ in range(3):
        weight.grad = torch.zeros(6, 4)
        optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(6, 4))


@pytest.mark.parametrize("change", [{"rank": 5}, {"state_bits": 8}, {"projection": "svd"}, {"update_proj_gap": 9}])
def test_resuming_with_other_options_is_refused(change):
    weights = make_weights()
    optimizer = make_optimizer(weights, rank=4)
    run(optimizer, weights, steps=1)
    saved = copy.deepcopy(optimizer.state_dict())
    other = make_optimizer(make_weights(), **{"rank": 4, **change})
    (name, value), old = next(iter(change.items())), optimizer.param_groups[0]
    with pytest.raises(ValueError, match=rf"other options in group 0: {name}={old[name]!r} \(now {value!r}\)"):
        other.load_state_dict(saved)
    assert not other.state


def test_resuming_for_other_weights_is_refused():
    weights = make_weights()
    optimizer = make_optimizer(weights, rank=4)
    run(optimizer, weights, steps=1)
    with pytest.raises(ValueError, match=r"groups of \[3, 1\] parameters, this one of \[4\]: .* other target modules"):
        GaLoreAdamW(make_weights()).load_state_dict(optimizer.state_dict())
    other = [*make_weights()[:2], parameter(torch.ones(9, 9)), make_weights()[3]]
    with pytest.raises(ValueError, match=r"moments \(17, 4\); a weight \(9, 9\) needs \(9, 4\): it was saved"):
        make_optimizer(other, rank=4).load_state_dict(optimizer.state_dict())


def test_options_of_a_group_are_numbers_and_words():
    """So that a checkpoint needs no pickle."""
    group = make_optimizer(make_weights(), rank=4).param_groups[0]
    assert GaLoreOptions.of(group) == GaLoreOptions(rank=4, update_proj_gap=2)
    assert all(isinstance(v, int | float | str | tuple | None) for k, v in group.items() if k != "params")
