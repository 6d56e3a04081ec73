"""Refinement: single signed steps by hand, and what must hold of a refined block whatever its data.

Shape legend: d_out, d_in features, n sequences, t tokens, d hidden size.
"""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_efficiency.calibration.engine import run_blockwise
from hf_efficiency.calibration.method import BlockContext
from hf_efficiency.calibration.structure import set_weight_, weight_of
from hf_efficiency.quantization import refinement
from hf_efficiency.quantization.affine import AffineGrid
from hf_efficiency.quantization.awq import AWQ
from hf_efficiency.quantization.formats import AffineTensors, default_g_idx
from hf_efficiency.quantization.gptq import GPTQ
from hf_efficiency.quantization.layers.affine import AffineLinear
from hf_efficiency.quantization.refinement import RefinedLinear, block_loss, refine_block
from hf_efficiency.quantization.rtn import RTN

METHODS = {"rtn": RTN, "gptq": GPTQ, "awq": AWQ}


def stored(dense, grid, codes=None, conv1d=False):
    """A storage layer with the nearest codes (or those given) and a linear layer that holds its decoded weight."""
    d_out, d_in = dense.shape
    layer = AffineLinear(d_in, d_out, bits=grid.bits, group_size=grid.group_size, layout="gptq_v2", conv1d=conv1d)
    tensors = grid.quantize(dense, *grid.fit(dense))
    if codes is not None:
        tensors.codes = codes
    layer.pack(tensors)
    linear = Conv1D(d_out, d_in) if conv1d else nn.Linear(d_in, d_out, bias=False)
    set_weight_(linear, layer.dequantize())
    return layer, linear


def weight(d_out, d_in, seed=0):
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed)) * 0.05


class Toy(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self, d=32):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def toy_context(grid, n=8, t=16, d=32, batch=1, seed=0):
    """A block context whose layers are rounded to nearest, and the dense weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = Toy(d)
        inputs = list(torch.randn(n, t, d).split(batch))
    with torch.no_grad():
        targets = [block(x) for x in inputs]
    linears = {"up": block.up, "down": block.down}
    dense = {name: weight_of(linear).clone() for name, linear in linears.items()}
    ctx = BlockContext("block", 0, block, inputs, targets, linears, lambda module, x, i: module(x))
    for name, w in dense.items():
        ctx.layers[name], _ = stored(w, grid)
    ctx.refresh()
    return ctx, dense


@torch.no_grad()
def total_loss(ctx):
    return sum(block_loss(ctx.run(x, i), ctx.targets[i]).item() for i, x in enumerate(ctx.inputs))


def by_hand():
    """Sixteen equal rows of the grid 0.125 (q - 1), q in 0 .. 3, with codes 2, 0, 3, 3 over and over."""
    dense = torch.tensor([[0.12, -0.13, 0.28, 0.36] * 8] * 16)
    layer = AffineLinear(32, 16, bits=2, group_size=-1, layout="gptq_v2")
    codes = torch.tensor([[2, 0, 3, 3] * 8] * 16, dtype=torch.uint8)
    ones = torch.ones(16, 1)
    layer.pack(AffineTensors(codes, ones * 0.125, ones.int(), default_g_idx(32, -1)))
    linear = nn.Linear(32, 16, bias=False)
    set_weight_(linear, layer.dequantize())
    return RefinedLinear(layer, linear, dense, AffineGrid(2, -1))


def first_four(tensor):
    """The first four of a row, which repeat over all."""
    flat = tensor.reshape(-1, 4)
    assert (flat == flat[0]).all()
    return flat[0].tolist()


def test_offsets_move_by_the_sign_of_the_gradient():
    learned = by_hand()
    weight = learned.linear.weight
    # Levels q - z are 1, -1, 2, 2; the range ends at -1 and 2. The dense weights lie at 0.96, -1.04, 2.24 and 2.88.
    # Inside the range the base starts half-way between the two; at its ends it stays dense.
    assert first_four(learned.base / 0.125) == pytest.approx([0.98, -1.04, 2.24, 2.88])
    weight.grad = torch.tensor([[3.0, 1e-6, -2.0, 5.0] * 8] * 16)
    learned.step(0.25, 0.0)
    # The last weight would round to level 3, outside the range, so no gradient passes.
    assert first_four(learned.offset) == [-0.25, -0.25, 0.25, 0.0]
    assert weight.grad is None
    # Rounded with offsets: 0.73, -1.29, 2.49 and 2.88, which is clipped.
    assert first_four(weight / 0.125) == [1, -1, 2, 2]
    weight.grad = torch.tensor([[3.0, 0.0, 0.0, 0.0] * 8] * 16)
    learned.step(0.25, 0.0)
    # 0.98 - 0.5 rounds to 0; a gradient of zero moves nothing.
    assert first_four(learned.offset) == [-0.5, -0.25, 0.25, 0.0]
    assert first_four(weight / 0.125) == [0, -1, 2, 2]
    weight.grad = torch.tensor([[3.0, 0.0, 0.0, 0.0] * 8] * 16)
    learned.step(0.25, 0.0)
    assert first_four(learned.offset) == [-0.5, -0.25, 0.25, 0.0]


@pytest.mark.parametrize(("sign", "high"), [(1.0, 0.9), (-1.0, 1.1)])
def test_the_upper_end_follows_clipped_weights(sign, high):
    learned = by_hand()
    # Only weights clipped at the upper end have a gradient: dw/ds = q - z = 2 and dw/dz = -s. With h = 0.25 and
    # l = -0.125, s = (a h - b l) / 3 and z = -b l / s: dw/da = (2 + z) h / 3 = 0.25, dw/db = -(2 + z) l / 3 + l = 0.
    learned.linear.weight.grad = torch.tensor([[0.0, 0.0, 0.0, sign] * 8] * 16)
    learned.step(0.01, 0.1)
    assert (learned.high_share - high).abs().max() < 1e-6
    assert (learned.low_share == 1).all()
    assert (learned.zero == 1).all()
    # Scales stay numbers that bfloat16 holds exactly.
    assert (learned.scale == torch.tensor((0.25 * high + 0.125) / 3).bfloat16()).all()


def test_the_gradients_of_scale_and_zero_are_those_of_autograd():
    grid = AffineGrid(3, 16)
    dense = weight(32, 64)
    layer, linear = stored(dense, grid)
    learned = RefinedLinear(layer, linear, dense, grid)
    learned.offset.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(3))
    grad = torch.randn(32, 64, generator=torch.Generator().manual_seed(4))
    seen = {}
    learned._step_shares = lambda rows, scale, zero, size: seen.update(scale=scale, zero=zero)
    learned._step_rows(slice(None), learned._grouped(grad.clone()), 0.0, 0.0)

    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, g):
            return g

    s = learned.scale.clone().unsqueeze(-1).requires_grad_()
    z = learned.zero.clone().unsqueeze(-1).requires_grad_()
    q = (Round.apply(learned.base / s + learned.offset) + z).clamp(0, 7)
    (s * (q - z) * learned._grouped(grad)).sum().backward()
    torch.testing.assert_close(seen["scale"], s.grad.squeeze(-1))
    torch.testing.assert_close(seen["zero"], z.grad.squeeze(-1), atol=1e-6, rtol=1e-4)


def test_loss_by_hand():
    target = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    output = torch.tensor([[[3.0, 5.0], [300.0, 500.0]]])
    # Each token is off by a fifth of its norm, whatever that is: 1/25, and the second equal part 10000/250000.
    assert block_loss(output, target).item() == pytest.approx(0.04)
    assert block_loss(target, target).item() == 0
    assert torch.isfinite(block_loss(torch.ones(1, 1, 2) * 0, torch.zeros(1, 1, 2)))


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [16, 24, -1])  # 24 leaves a ragged group
def test_learning_starts_from_the_one_shot_codes(group_size, sym, conv1d):
    grid = AffineGrid(3, group_size, sym)
    dense = weight(32, 64)
    # Codes far from the dense weights, as error feedback makes them.
    wild = torch.randint(0, 8, dense.shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    for codes in (None, wild):
        layer, linear = stored(dense, grid, codes, conv1d)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        learned = RefinedLinear(layer, linear, dense, grid)
        learned.write()
        assert torch.equal(weight_of(linear), layer.dequantize())
        learned.pack()
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [8, 24, -1])
def test_packed_layers_hold_the_learned_weights_exactly(group_size, sym):
    grid = AffineGrid(2, group_size, sym)
    ctx, dense = toy_context(grid)
    learners = {name: RefinedLinear(ctx.layers[name], ctx.linears[name], dense[name], grid) for name in dense}
    generator = torch.Generator().manual_seed(2)
    for _ in range(9):
        for learned in learners.values():
            shape = learned.linear.weight.shape
            learned.linear.weight.grad = torch.randn(shape, generator=generator)
            learned.step(0.3, 0.05)
            assert learned.offset.abs().max() <= 0.5
            assert learned.zero.min() >= 1
            assert learned.zero.max() <= 3
    for name, learned in learners.items():
        learned.pack()
        assert torch.equal(ctx.layers[name].dequantize(), weight_of(ctx.linears[name]))
        assert not torch.equal(ctx.layers[name].unpack().codes, learned.start.codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [False, True])
def test_the_loss_falls(bits, sym):
    grid = AffineGrid(bits, 16, sym)
    ctx, dense = toy_context(grid)
    before = total_loss(ctx)
    refine_block(ctx, dense, dict.fromkeys(dense, grid), steps=20)
    ctx.refresh()
    assert total_loss(ctx) < 0.75 * before


def test_a_result_worse_than_the_start_is_dropped():
    grid = AffineGrid(8, 16)
    ctx, dense = toy_context(grid)
    before = {name: layer.unpack().codes.clone() for name, layer in ctx.layers.items()}
    loss = total_loss(ctx)
    # The first and only step moves every range by 30 %.
    refine_block(ctx, dense, dict.fromkeys(dense, grid), steps=1, lr=1.0)
    ctx.refresh()
    assert total_loss(ctx) == loss
    for name, layer in ctx.layers.items():
        assert torch.equal(layer.unpack().codes, before[name])


def test_targets_that_are_not_finite_leave_the_start():
    grid = AffineGrid(4, 16)
    ctx, dense = toy_context(grid)
    ctx.targets[0] = ctx.targets[0] * torch.nan
    before = {name: layer.dequantize() for name, layer in ctx.layers.items()}
    refine_block(ctx, dense, dict.fromkeys(dense, grid), steps=3)
    for name, layer in ctx.layers.items():
        assert torch.equal(layer.dequantize(), before[name])


def test_gradient_flags_come_back_even_after_an_error():
    grid = AffineGrid(4, 16)
    ctx, dense = toy_context(grid)
    ctx.block.norm.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in ctx.block.named_parameters()}

    def check():
        assert {name: p.requires_grad for name, p in ctx.block.named_parameters()} == flags
        assert all(p.grad is None for p in ctx.block.parameters())

    with torch.no_grad():
        refine_block(ctx, dense, dict.fromkeys(dense, grid), steps=2)
        assert not torch.is_grad_enabled()
    check()
    calls = []

    def fails(module, x, i):
        calls.append(i)
        if len(calls) == refinement._JUDGED + 3:
            raise RuntimeError("out of memory")
        return module(x)

    ctx.call = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        refine_block(ctx, dense, dict.fromkeys(dense, grid), steps=2)
    check()


@pytest.mark.parametrize(("micro", "batch_size", "expected"), [(1, 2, 2), (1, 1, 1), (2, 4, 2), (4, 2, 1), (3, 8, 2)])
def test_batch_size_counts_sequences(micro, batch_size, expected):
    grid = AffineGrid(4, 16)
    ctx, dense = toy_context(grid, batch=micro)
    calls = []
    ctx.call = lambda module, x, i: (calls.append(i), module(x))[1]
    refine_block(ctx, dense, dict.fromkeys(dense, grid), steps=5, batch_size=batch_size)
    judged = min(refinement._JUDGED, len(ctx.inputs))
    steps = calls[judged : len(calls) - judged]
    assert len(steps) == 5 * expected
    # Every micro-batch comes up before any comes up again.
    assert len(set(steps[: len(ctx.inputs)])) == min(len(steps), len(ctx.inputs))


def test_without_the_dense_stream():
    grid = AffineGrid(4, 16)
    ctx, dense = toy_context(grid)
    ctx.targets = None
    with pytest.raises(ValueError, match="block: refinement needs the dense block's outputs"):
        refine_block(ctx, dense, dict.fromkeys(dense, grid), steps=1)


def relative_error(model, reference, tokens):
    with torch.no_grad():
        found, wanted = (m.model(tokens, use_cache=False).last_hidden_state for m in (model, reference))
    return ((found - wanted).square().sum() / wanted.square().sum()).item()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_gains(name, bits, tiny_llama, tiny_tokens):
    found = []
    for refine_steps in (0, 24):
        model = copy.deepcopy(tiny_llama)
        method = METHODS[name](bits=bits, group_size=32, refine_steps=refine_steps)
        method.validate()
        layers = run_blockwise(model, tiny_tokens, method, progress=False)
        assert all(isinstance(layer, AffineLinear) for layer in layers.values())
        assert not [key for key in vars(method) if "dense" in key]
        found.append(relative_error(model, tiny_llama, tiny_tokens))
    assert found[1] < found[0]


def test_the_same_run_gives_the_same_codes(tiny_llama, tiny_tokens):
    runs = [
        run_blockwise(copy.deepcopy(tiny_llama), tiny_tokens, GPTQ(group_size=32, refine_steps=3), progress=False)
        for _ in range(2)
    ]
    for name, layer in runs[0].items():
        assert torch.equal(layer.W_q, runs[1][name].W_q)


@pytest.mark.parametrize(("granularity", "shared"), [("tensor", 64), ("block", 16)])
def test_shared_ranges_stay_shared(granularity, shared, tiny_llama, tiny_tokens):
    start, refined = (
        run_blockwise(copy.deepcopy(tiny_llama), tiny_tokens, rtn(granularity, steps), progress=False)
        for steps in (0, 24)
    )
    name = "model.layers.0.self_attn.q_proj"
    scales = refined[name].unpack().scales
    assert (scales[:shared] == scales[0]).all()
    assert torch.equal(scales, start[name].unpack().scales)
    assert not torch.equal(refined[name].W_q, start[name].W_q)


def rtn(granularity, refine_steps):
    method = RTN(bits=3, group_size=32, granularity=granularity, refine_steps=refine_steps)
    method.validate()
    return method


def test_layers_left_dense_stay_untouched(tiny_llama, tiny_tokens):
    model = copy.deepcopy(tiny_llama)
    method = GPTQ(group_size=32, refine_steps=2, dynamic={"-:.*v_proj": {}, ".*down_proj": {"bits": 8}})
    skip = [name for name, _ in model.named_modules() if method.skips(name)]
    layers = run_blockwise(model, tiny_tokens, method, skip=skip, progress=False)
    dense = tiny_llama.model.layers[0].self_attn.v_proj.weight
    assert torch.equal(model.model.layers[0].self_attn.v_proj.weight, dense)
    assert layers["model.layers.0.mlp.down_proj"].bits == 8


def test_bfloat16_blocks(tiny_llama, tiny_tokens):
    model = copy.deepcopy(tiny_llama).to(torch.bfloat16)
    reference = copy.deepcopy(model)
    run_blockwise(model, tiny_tokens, GPTQ(bits=2, group_size=32), progress=False)
    refined = copy.deepcopy(reference)
    run_blockwise(refined, tiny_tokens, GPTQ(bits=2, group_size=32, refine_steps=16), progress=False)
    assert relative_error(refined, reference, tiny_tokens) < relative_error(model, reference, tiny_tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"refine_steps": -1}, "refine_steps=-1 must be a whole number: 0 for no refinement"),
        ({"refine_steps": 2.0}, r"refine_steps=2\.0 must be a whole number"),
        ({"refine_steps": True}, "refine_steps=True must be a whole number"),
        ({"refine_lr": 0}, "refine_lr=0 must lie above 0 and at most at 1"),
        ({"refine_lr": 1.5}, r"refine_lr=1\.5 must lie above 0"),
        ({"refine_lr": float("nan")}, "refine_lr=nan must lie above 0"),
        ({"refine_batch_size": 0}, "refine_batch_size=0 must be a whole number of at least 1"),
    ],
)
@pytest.mark.parametrize("method", METHODS.values())
def test_bad_settings(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        method(**arguments).validate()
