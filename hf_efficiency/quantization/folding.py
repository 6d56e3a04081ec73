"""Finds where a scale of a linear layer's input channels can be undone: in the norm or linear layer that makes them.

Nothing here knows a model's name. The block is run on a little data with some of its weights replaced; what its tensors
do then tells what feeds what. Powers of two scale exactly in floating point, so the answers are no matter of degree:

- A norm makes a layer's input if its output is that input.
- A linear layer makes a layer's input, channel by channel, if doubling its outputs doubles that input. Which channel
  makes which is read off by giving every output channel powers of two of its own, digit by digit. In a causal attention
  the first token sees itself only, so its row of the input shows the value channels alone, in fused projections too.
- Either is accepted only if scaling it and unscaling all readers leaves the block's output as it was. A reader that was
  missed (a router, a residual branch) changes the output and so refuses the fold.

Shape legend: t tokens, d_in features of the readers, n output channels of the producer.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_efficiency.calibration.method import BlockContext
from hf_efficiency.calibration.structure import is_conv1d, is_linear, linear_sizes

_BASE = 16  # powers of two 2^1 .. 2^16 tell 16 channels apart in one run
_TOLERANCE = 1e-3

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Fold:
    """A group of linear layers whose input channels may be scaled, and what undoes the scale.

    Attributes:
        readers: Names, inside the block, of all linear layers that read the tensor.
        producer: Name of the norm or linear layer that makes it.
        channels: n, output channels of the producer.
        index: (d_in,) on the CPU, the producer's channel behind each input channel. One that repeats is shared by
            several (the value heads of grouped-query attention).
        offset: 1 where a norm multiplies by 1 + weight, else 0.
    """

    readers: tuple[str, ...]
    producer: str
    channels: int
    index: Tensor
    offset: int = 0

    @property
    def used(self) -> Tensor:
        """(n,) bool on the CPU: which of the producer's channels the readers see (of a fused projection, some)."""
        return torch.zeros(self.channels, dtype=torch.bool).index_fill_(0, self.index, True)

    def undo(self, block: nn.Module, tensors: Tensors, scale: Tensor) -> dict[str, Tensor]:
        """The producer's tensors with its outputs divided by `scale` (n,), those that the readers don't see aside."""
        scale = torch.where(self.used.to(scale.device), scale, 1.0)
        module = block.get_submodule(self.producer)
        key = f"{self.producer}.weight"
        weight = tensors[key].float()
        divisor = scale.to(weight.device)
        if is_linear(module) and not is_conv1d(module):
            divisor = divisor.unsqueeze(1)
        changed = {key: (weight + self.offset) / divisor - self.offset}
        if (bias := tensors.get(f"{self.producer}.bias")) is not None:
            changed[f"{self.producer}.bias"] = bias.float() / scale.to(bias.device)
        return changed

    def apply(self, block: nn.Module, tensors: Tensors, scale: Tensor) -> dict[str, Tensor]:
        """All changed tensors: the readers' inputs multiplied by `scale` (n,), the producer's outputs divided by it."""
        changed = self.undo(block, tensors, scale)
        for name in self.readers:
            key = f"{name}.weight"
            factor = scale[self.index.to(scale.device)].to(tensors[key].device)
            if is_conv1d(block.get_submodule(name)):
                factor = factor.unsqueeze(1)
            # A reader of one group may be the producer of another, but never of its own.
            changed[key] = tensors[key].float() * factor
        return changed

    @torch.no_grad()
    def apply_(self, block: nn.Module, scale: Tensor) -> None:
        """Scales the block's own parameters."""
        parameters = dict(block.named_parameters())
        for name, value in self.apply(block, parameters, scale).items():
            parameters[name].copy_(value)


class Trial(nn.Module):
    """Runs a block in float32 on one sequence, with chosen tensors replaced; the block itself is never changed.

    Args:
        ctx: The block, and its first micro-batch (b, t, d).
    """

    def __init__(self, ctx: BlockContext) -> None:
        super().__init__()
        self.block = ctx.block
        self._ctx = ctx
        self._replaced: Tensors = {}
        self._x = ctx.inputs[0]
        self.tensors: dict[str, Tensor] = {
            name: t.detach().float()
            for name, t in (*ctx.block.named_parameters(), *ctx.block.named_buffers())
            if t.is_floating_point()
        }
        self._sliced = self._x.shape[0] not in (1, self._x.shape[1])
        if self._sliced:
            try:
                self.run()
            except RuntimeError:
                # Some argument mixes the batch with another axis (Bloom's alibi: batch times heads).
                self._sliced = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Called with the model's own arguments."""
        args, kwargs = self._convert(args), self._convert(kwargs)
        return functional_call(self.block, {**self.tensors, **self._replaced}, args, kwargs)

    @torch.no_grad()
    def run(self, replaced: Tensors | None = None) -> Tensor:
        """The block's output (1, t, d) with some tensors replaced; (b, t, d) where the batch can't be cut."""
        self._replaced = replaced or {}
        return self._ctx.call(self, self._x, 0)

    def _convert(self, value: Any) -> Any:
        """Float tensors in float32, and of a batch the first sequence only."""
        if isinstance(value, Tensor):
            if self._sliced and value.ndim > 1 and value.shape[0] == self._x.shape[0]:
                value = value[:1]
            return value.float() if value.is_floating_point() else value
        if isinstance(value, (tuple, list)):
            return type(value)(self._convert(v) for v in value)
        if isinstance(value, dict):
            return {k: self._convert(v) for k, v in value.items()}
        return value


@dataclass
class _Flow:
    """What one run showed, in the order of execution."""

    groups: list[list[str]] = field(default_factory=list)  # linear layers by the tensor they read
    inputs: list[Tensor] = field(default_factory=list)  # (rows, d_in), one a group
    norms: dict[str, Tensor] = field(default_factory=dict)  # output (rows, d) of every module with a vector as weight
    order: dict[str, int] = field(default_factory=dict)  # place of every linear layer in the order of calls


def find_folds(ctx: BlockContext, known: dict[tuple[Any, ...], list[Fold]] | None = None) -> list[Fold]:
    """All input groups of a block whose scale can be folded away, in the order of execution.

    Args:
        ctx: The block, all of it dense.
        known: What was found in blocks with the same modules. There it is checked only, not searched again. Updated.
    """
    known = {} if known is None else known
    trial = Trial(ctx)
    form = tuple((name, type(m), tuple(p.shape for p in m.parameters(False))) for name, m in ctx.block.named_modules())
    if form in known and (not known[form] or holds(trial, known[form])):
        return known[form]
    flow, output = _observe(trial)
    folds = []
    for group, x in zip(flow.groups, flow.inputs, strict=True):
        for fold in _candidates(trial, flow, group, x):
            if holds(trial, [fold], output):
                folds.append(fold)
                break
    known[form] = folds
    return folds


def holds(trial: Trial, folds: list[Fold], output: Tensor | None = None) -> bool:
    """Whether the block's output stays the same when channels are scaled by random powers of two and unscaled again."""
    output = trial.run() if output is None else output
    generator = torch.Generator().manual_seed(0)
    both: dict[str, Tensor] = {}
    one: dict[str, Tensor] = {}
    for fold in folds:
        scale = 2.0 ** (torch.randint(0, 2, (fold.channels,), generator=generator) * 2 - 1)
        both.update(fold.apply(trial.block, {**trial.tensors, **both}, scale))
        one.update(fold.undo(trial.block, {**trial.tensors, **one}, scale))
    change = (trial.run(one) - output).norm()
    rest = (trial.run(both) - output).norm()
    return bool(change > 0) and bool(rest <= _TOLERANCE * change)


def _observe(trial: Trial) -> tuple[_Flow, Tensor]:
    """One run with everything recorded, and the block's output."""
    flow = _Flow()
    place: dict[tuple[int, int], int] = {}
    alive: list[Tensor] = []  # so that an address stands for one tensor

    def on_linear(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            key = (x.data_ptr(), x.numel())
            if key not in place:
                place[key] = len(flow.groups)
                alive.append(x)
                flow.groups.append([])
                flow.inputs.append(x.reshape(-1, x.shape[-1]))
            if name not in flow.order:
                flow.order[name] = len(flow.order)
                flow.groups[place[key]].append(name)

        return hook

    def on_norm(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            if isinstance(result, Tensor):
                flow.norms[name] = result.reshape(-1, result.shape[-1])

        return hook

    with ExitStack() as stack:
        for name, module in trial.block.named_modules():
            if is_linear(module):
                stack.callback(module.register_forward_pre_hook(on_linear(name)).remove)
            elif isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 1:
                stack.callback(module.register_forward_hook(on_norm(name)).remove)
        output = trial.run()
    return flow, output


def _candidates(trial: Trial, flow: _Flow, group: list[str], x: Tensor) -> Iterator[Fold]:
    """Folds that might hold: norms whose output is x, then linear layers before the group, the nearest first."""
    readers, d_in = tuple(group), x.shape[1]
    for name, made in flow.norms.items():
        if made.shape == x.shape and torch.equal(made, x):
            identity = torch.arange(d_in)
            for offset in (0, 1):
                yield Fold(readers, name, d_in, identity, offset)
    first = min(flow.order[name] for name in group)
    for name in sorted(flow.order, key=flow.order.__getitem__, reverse=True):
        if flow.order[name] < first and (index := _channel_map(trial, name, group[0], x)) is not None:
            yield Fold(readers, name, linear_sizes(trial.block.get_submodule(name))[1], index)


def _channel_map(trial: Trial, producer: str, reader: str, x: Tensor) -> Tensor | None:
    """The channel of `producer` behind each input channel of `reader` (d_in,), or None where x isn't made from it."""
    channels = linear_sizes(trial.block.get_submodule(producer))[1]
    d_in = x.shape[1]
    if channels < d_in and d_in % channels:
        return None
    known = x[0] != 0
    every = torch.arange(channels, device=x.device)
    fold = Fold((), producer, channels, every.cpu())

    def exponents(powers: Tensor) -> Tensor | None:
        """Which power of two each known channel was multiplied by, when the producer's outputs were by 2^powers."""
        seen = _input_of(trial, reader, fold.undo(trial.block, trial.tensors, 2.0**-powers))
        power = torch.log2(seen[0][known] / x[0][known])
        whole = power.round()
        return whole.long() if bool(((power - whole).abs() < _TOLERANCE).all()) else None

    # One run that most candidates fail, before those that tell channels apart. A fused gate and value fail as a whole,
    # so its last and first channels are tried alone.
    supports = [every >= 0] + [every >= channels - d_in, every < d_in] * (channels > d_in)
    for support in supports if known.any() else []:
        doubled = exponents(support.long())
        if doubled is None or not bool((doubled == 1).all()):
            continue
        index, place = torch.zeros_like(x[0], dtype=torch.long), 1
        while place < channels:
            digit = exponents(support * (every // place % _BASE + 1))
            if digit is None or not bool((digit > 0).all()):
                break
            index[known] += (digit - 1) * place
            place *= _BASE
        else:
            return _fill(index.cpu(), known.cpu(), channels)
    return None


def _fill(index: Tensor, known: Tensor, channels: int) -> Tensor | None:
    """Completes a map where channels were silent (after a ReLU, say), which tell nothing by themselves."""
    if not known.all():
        identity = torch.arange(len(index))
        if channels != len(index) or not torch.equal(index[known], identity[known]):
            return None
        return identity
    return index if int(index.max()) < channels else None


def _input_of(trial: Trial, name: str, replaced: Tensors) -> Tensor:
    """What the linear layer `name` reads, (rows, d_in), when some tensors are replaced."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].reshape(-1, args[0].shape[-1]))

    handle = trial.block.get_submodule(name).register_forward_pre_hook(hook)
    try:
        trial.run(replaced)
    finally:
        handle.remove()
    return seen[0]
