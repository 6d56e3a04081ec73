"""Refinement: the rounding and the clipping of one block, learned by signed gradients against the dense block.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (SignRound, 2023).
With W the weight, a learned offset V and learned shares alpha, beta of each group's range:

    s = (alpha high - beta low) / (2^bits - 1)      z = round(-beta low / s)
    Wq = s (clip(round(W / s + V) + z, 0, 2^bits - 1) - z)

Every offset and every share moves by the sign of its gradient. The rounding counts as the identity in the gradient.
Shape legend: d_out, d_in features, g groups of k columns along d_in, b sequences of a micro-batch, t tokens, d hidden.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_efficiency.calibration.method import BlockContext
from hf_efficiency.calibration.structure import dense_parameters, is_conv1d, weight_of
from hf_efficiency.quantization.affine import AffineGrid, storable_scale
from hf_efficiency.quantization.formats import AffineTensors
from hf_efficiency.quantization.layers.affine import AffineLinear

# How far an offset may move a weight: half a step either way reaches both neighbours.
_REACH = 0.5
# The paper starts from V = 0. Here V starts half-way to where the one-shot code came from, at most this far.
_START = 0.45
# Shares of the one-shot range within which clipping is learned.
_SHARES = (0.3, 1.2)
# The first step of an offset times the number of steps, and the step of a share beside that of an offset. Chosen on
# SmolLM2-135M's first blocks at 4 bits.
_FIRST_STEP = 0.7
_SHARE_STEP = 0.3
# Weights that are updated together: their temporaries stay in a core's cache.
_CHUNK = 1 << 16
# Micro-batches on which the result is compared with the one-shot start.
_JUDGED = 4


def check_refinement(steps: int, lr: float | None, batch_size: int) -> None:
    """Checks the settings of a refinement.

    Raises:
        ValueError: For values out of range, naming the cure.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"refine_steps={steps!r} must be a whole number: 0 for no refinement, 20 to 200 are usual.")
    if lr is not None and not 0 < lr <= 1:
        raise ValueError(f"refine_lr={lr!r} must lie above 0 and at most at 1, or be None for the default.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"refine_batch_size={batch_size!r} must be a whole number of at least 1 (2 to 8 are usual).")


class RefinedLinear:
    """The learned quantities of one layer.

    Args:
        layer: The stored layer, from whose codes, scales and zero points learning starts.
        linear: The dense layer that stands in the block; its weight is overwritten.
        dense: The weight to be quantized, (d_out, d_in).
        grid: The layer's grid.
    """

    def __init__(self, layer: AffineLinear, linear: nn.Module, dense: Tensor, grid: AffineGrid) -> None:
        self.start = layer.unpack()
        self.layer, self.linear, self.grid = layer, linear, grid
        self.d_out, self.d_in = dense.shape
        self.size = self.d_in if grid.group_size == -1 else grid.group_size
        self.top = float(grid.top)
        self.scale, self.zero = self.start.scales.float(), self.start.zeros.float()
        # The range that the one-shot method chose; shares of it are learned.
        self.low, self.high = -self.scale * self.zero, self.scale * (self.top - self.zero)
        self.low_share, self.high_share = torch.ones_like(self.scale), torch.ones_like(self.scale)
        levels = self._grouped(self.start.codes.float() - self.zero.repeat_interleave(self.size, 1)[:, : self.d_in])
        # Error feedback may have moved a weight further than half a step from its dense value, out of reach of any
        # offset. So the base moves along with the code, and the next code on the dense value's side is a step away.
        # Clipped weights keep the dense base: how far outside the range it lies matters when the range widens.
        excess = levels - self._grouped(dense.float()) / self.scale.unsqueeze(-1)
        zero = self.zero.unsqueeze(-1)
        clipped = (levels <= -zero) & (excess > 0) | (levels >= self.top - zero) & (excess < 0)
        inner = torch.where(clipped, excess, (excess * 0.5).clamp_(-_START, _START))
        self.base = (levels - inner) * self.scale.unsqueeze(-1)
        self.offset = torch.zeros_like(levels)

    def _grouped(self, weight: Tensor) -> Tensor:
        """(n, d_in) to (n, g, k), a ragged last group padded by zeros."""
        padding = -self.d_in % self.size
        return torch.nn.functional.pad(weight, (0, padding)).view(weight.shape[0], -1, self.size)

    def _flat(self, grouped: Tensor) -> Tensor:
        """Inverse of `_grouped`, for any number of rows."""
        return grouped.flatten(1)[:, : self.d_in]

    def _chunks(self) -> Iterator[slice]:
        step = max(1, _CHUNK // self.base[0].numel())
        for start in range(0, self.d_out, step):
            yield slice(start, min(start + step, self.d_out))

    def write(self) -> None:
        """Writes the weight of the present parameters into the dense layer."""
        target = weight_of(self.linear)
        for rows in self._chunks():
            scale, zero = self.scale[rows].unsqueeze(-1), self.zero[rows].unsqueeze(-1)
            levels = torch.div(self.base[rows], scale).add_(self.offset[rows]).round_()
            levels = torch.maximum(torch.minimum(levels, self.top - zero), -zero)
            target[rows].copy_(self._flat(levels.mul_(scale)))

    @torch.no_grad()
    def step(self, size: float, share_size: float) -> None:
        """One signed step along the gradient that lies in the dense layer's weight, which is rewritten.

        Args:
            size: How far an offset moves, in units of the grid's spacing.
            share_size: How far a share of the range moves. Ranges that several rows share stay as they are.
        """
        weight = dense_parameters(self.linear)[0]
        if weight.grad is None:
            return
        grad = weight.grad.T if is_conv1d(self.linear) else weight.grad
        if self.grid.rows != 1:
            share_size = 0.0
        for rows in self._chunks():
            self._step_rows(rows, self._grouped(grad[rows].float()), size, share_size)
        weight.grad = None
        self.write()

    def _step_rows(self, rows: slice, grad: Tensor, size: float, share_size: float) -> None:
        scale, zero = self.scale[rows], self.zero[rows]
        s, z = scale.unsqueeze(-1), zero.unsqueeze(-1)
        position = self.base[rows] / s
        free = torch.add(position, self.offset[rows]).round_()
        levels = torch.maximum(torch.minimum(free, self.top - z), -z)
        inside = free.eq_(levels)  # 1 where nothing was clipped, else 0
        # With the rounding as the identity, dWq/ds is level - position inside the range and the level outside of it.
        grad_scale = levels.sub_(position.mul_(inside)).mul_(grad).sum(-1)
        passed = grad * inside
        grad_zero = (passed.sum(-1) - grad.sum(-1)).mul_(scale)
        self._step_shares(rows, grad_scale, grad_zero, share_size)
        self.offset[rows].sub_(passed.sign_(), alpha=size).clamp_(-_REACH, _REACH)

    def _step_shares(self, rows: slice, grad_scale: Tensor, grad_zero: Tensor, size: float) -> None:
        """Moves the ends of the ranges, and with them scales and zero points. All (n, g)."""
        low, high, scale = self.low[rows], self.high[rows], self.scale[rows]
        if self.grid.sym:
            self.high_share[rows].sub_(size * (grad_scale * (high - low)).sign()).clamp_(*_SHARES)
            self.low_share[rows] = self.high_share[rows]
        else:
            # z = -beta low / s falls as s grows.
            total = (grad_scale - grad_zero * self.zero[rows] / scale) / self.top
            self.high_share[rows].sub_(size * (total * high).sign()).clamp_(*_SHARES)
            self.low_share[rows].sub_(size * (-total * low - grad_zero * low / scale).sign()).clamp_(*_SHARES)
        low, high = self.low_share[rows] * low, self.high_share[rows] * high
        self.scale[rows] = storable_scale((high - low) / self.top)
        if not self.grid.sym:
            self.zero[rows] = torch.round(-low / self.scale[rows]).clamp_(1, self.top)

    def pack(self) -> None:
        """Packs the present codes, scales and zero points into the stored layer."""
        s, z = self.scale.unsqueeze(-1), self.zero.unsqueeze(-1)
        codes = self._flat((self.base / s).add_(self.offset).round_().add_(z).clamp_(0, self.top))
        zeros = self.zero.to(torch.int32)
        self.layer.pack(AffineTensors(codes.to(torch.uint8), self.scale, zeros, self.start.g_idx))

    def restore(self) -> None:
        """Packs the one-shot result again."""
        self.layer.pack(self.start)


@contextmanager
def _only_weights_learn(block: nn.Module, learners: Sequence[RefinedLinear]) -> Iterator[None]:
    """Asks for gradients of the learners' weights and of nothing else in the block; restores all of it afterwards."""
    learned = {id(dense_parameters(learner.linear)[0]) for learner in learners}
    before = [(p, p.requires_grad) for p in block.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in learned)
        with torch.enable_grad():
            yield
    finally:
        for p, flag in before:
            p.grad = None
            p.requires_grad_(flag)


def block_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of the squared error relative to the token's energy, (); both (b, t, d).

    The paper takes the plain mean of squares, which a first token with massive activations decides alone.
    """
    wanted = target.float()
    energy = wanted.square().mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return ((output.float() - wanted).square() / energy).mean()


def refine_block(
    ctx: BlockContext,
    dense: Mapping[str, Tensor],
    grids: Mapping[str, AffineGrid],
    *,
    steps: int,
    lr: float | None = None,
    batch_size: int = 2,
) -> None:
    """Learns the rounding and clipping of all affine layers of a block, in place of what `ctx.layers` store.

    Args:
        ctx: The block, with its inputs and the dense block's outputs.
        dense: The weights that are quantized, by layer, (d_out, d_in).
        grids: The grids of the layers.
        steps: Number of steps; their size falls linearly to zero.
        lr: Size of the first step of an offset, in units of the grid's spacing. Shares of the range move in the same
            proportion as by default.
        batch_size: Sequences that a step averages, rounded down to whole micro-batches, but at least one.

    Raises:
        ValueError: If the dense outputs were not kept.
    """
    if ctx.targets is None:
        raise ValueError(f"{ctx.name}: refinement needs the dense block's outputs, which were not kept.")
    learners = [
        RefinedLinear(layer, ctx.linears[name], dense[name], grids[name])
        for name, layer in ctx.layers.items()
        if isinstance(layer, AffineLinear)
    ]
    first = _FIRST_STEP / steps if lr is None else lr
    generator = torch.Generator().manual_seed(ctx.index)
    order: list[int] = []
    count = max(1, batch_size // ctx.inputs[0].shape[0])
    before = _judge(ctx, ctx.targets)
    for learner in learners:
        learner.write()
    with _only_weights_learn(ctx.block, learners):
        for step in range(steps):
            while len(order) < count:
                order += torch.randperm(len(ctx.inputs), generator=generator).tolist()
            batch, order = order[:count], order[count:]
            for i in batch:
                loss = block_loss(ctx.run(ctx.inputs[i], i), ctx.targets[i].to(ctx.inputs[i].device))
                loss.backward()
            size = first * (1 - step / steps)
            for learner in learners:
                learner.step(size, size * _SHARE_STEP)
    if _judge(ctx, ctx.targets) < before:
        for learner in learners:
            learner.pack()
    else:
        for learner in learners:
            learner.restore()


@torch.no_grad()
def _judge(ctx: BlockContext, targets: Sequence[Tensor]) -> float:
    """The loss over the first micro-batches with the weights that stand in the block."""
    judged = range(min(_JUDGED, len(ctx.inputs)))
    return sum(block_loss(ctx.run(ctx.inputs[i], i), targets[i].to(ctx.inputs[i].device)).item() for i in judged)
