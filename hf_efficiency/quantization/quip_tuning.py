"""The fine-tuning of QuIP#: signs relaxed to real vectors, and norms, against the dense block's outputs.

Tseng et al. 2024, section 5. The codes stay as they are. Around a fixed decoded weight M a layer computes
`SU * (M (SV * x))`, so a step costs a forward and a backward to the activations, without any rotation.

Shape legend: b sequences of a micro-batch, t tokens, d hidden size, d_in, d_out features.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficiency.calibration.method import BlockContext
from hf_efficiency.calibration.structure import dense_parameters, set_weight_
from hf_efficiency.quantization.layers.lattice import LatticeLinear

# Micro-batches on which the result is compared with the start.
_JUDGED = 4


@dataclass
class TunedLayer:
    """Master copies of one layer's vectors: SU (d_out,) and SV (d_in,) float32."""

    layer: LatticeLinear
    linear: nn.Module
    su: Tensor
    sv: Tensor

    def scale_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of the dense layer that stands for the compressed one."""
        return (args[0] * self.sv.to(args[0].dtype), *args[1:])

    def scale_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook; a bias is added after the scaling."""
        su = self.su.to(output.dtype)
        own_bias = dense_parameters(module)[1]
        if own_bias is None:
            return output * su
        bias = own_bias.to(output.dtype)
        return (output - bias) * su + bias


def tune_block(
    ctx: BlockContext, *, steps: int, learning_rate: float, micro_batches: int, seed: int
) -> tuple[float, float]:
    """Fine-tune the vectors of all lattice layers of a block, and its norms and biases.

    What does not lower the loss over the first micro-batches is not kept.

    Args:
        ctx: A block whose layers are all stored, with `targets`.
        steps: Updates.
        learning_rate: Of Adam, for the vectors at the start; it falls to zero by half a cosine.
        micro_batches: How many micro-batches a step averages.
        seed: Of the order of micro-batches.

    Returns:
        The loss over the first micro-batches before and after, with what was kept.

    Raises:
        ValueError: The context has no targets, or the loss is not finite.
    """
    if ctx.targets is None:
        raise ValueError(f"{ctx.name}: fine-tuning needs the dense model's hidden states (`keep_dense`).")
    layers = [_tuned(ctx, name) for name in ctx.layers]
    vectors = [v for tuned in layers for v in (tuned.su, tuned.sv)]
    masters = _small_parameters(ctx)
    optimizer = torch.optim.Adam([*vectors, *masters.values()], lr=learning_rate, betas=(0.9, 0.95))
    order = _cycle(len(ctx.inputs), seed)
    targets, weights = ctx.targets, channel_weights(ctx.targets)

    def loss_of(i: int) -> Tensor:
        output = _run(ctx, masters, i)
        return weighted_error(output, targets[i].to(output.device), weights)

    with torch.enable_grad(), _scaled(layers):
        before = _judge(loss_of, len(ctx.inputs))
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
            total = 0.0
            for _ in range(micro_batches):
                loss = loss_of(next(order)) / micro_batches
                loss.backward()
                total += loss.item()
            if not math.isfinite(total):
                raise ValueError(f"{ctx.name}: the fine-tuning loss is {total}; lower `fine_tune_learning_rate`.")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        after = _judge(loss_of, len(ctx.inputs))
    if after < before:
        _write_back(ctx, layers, masters)
    return before, min(before, after)


@torch.no_grad()
def channel_weights(targets: Iterable[Tensor]) -> Tensor:
    """What each channel's squared error counts, (d,): the reciprocal of its mean square over all tokens.

    Tokens are first brought to one length, as the next block's norm does. Without the weights, the few channels that
    are large in every token decide the loss, though norms scale them down before anything reads them.

    Args:
        targets: Hidden states (b, t, d), each.
    """
    total, tokens = torch.zeros(()), 0
    for target in targets:
        rows = _normalized(target, target).flatten(0, -2)
        total = total.to(rows.device) + rows.square().sum(0)
        tokens += len(rows)
    return tokens / (total * len(total)).clamp_min(1e-6 * tokens)


def weighted_error(output: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Squared error of the tokens, brought to the length that `target` has, averaged; about 1 for an output of zeros.

    Args:
        output: (b, t, d).
        target: (b, t, d).
        weights: (d,), of `channel_weights`.
    """
    difference = _normalized(output, target) - _normalized(target, target)
    return (difference.square() * weights).sum(-1).mean()


def _normalized(x: Tensor, target: Tensor) -> Tensor:
    """x over the root mean square of each token of `target`: the few tokens of huge norm may not outweigh the rest."""
    return x.float() * target.float().square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def _tuned(ctx: BlockContext, name: str) -> TunedLayer:
    layer, linear = ctx.layers[name], ctx.linears[name]
    if not isinstance(layer, LatticeLinear) or not layer.tuned:
        raise TypeError(f"{name}: only lattice layers that store their vectors can be fine-tuned.")
    set_weight_(linear, layer.unsigned())
    su, sv = (v.clone().requires_grad_() for v in layer.vectors())
    return TunedLayer(layer, linear, su, sv)


def _small_parameters(ctx: BlockContext) -> dict[str, Tensor]:
    """float32 copies of the block's norms and biases, by name inside the block."""
    return {
        name: p.detach().float().clone().requires_grad_()
        for name, p in ctx.block.named_parameters()
        if p.ndim == 1 and p.is_floating_point()
    }


@contextmanager
def _scaled(layers: list[TunedLayer]) -> Iterator[None]:
    """Dense layers multiply by their vectors while this lasts."""
    with ExitStack() as stack:
        for tuned in layers:
            stack.callback(tuned.linear.register_forward_pre_hook(tuned.scale_input).remove)
            stack.callback(tuned.linear.register_forward_hook(tuned.scale_output).remove)
        yield


class _Swapped(nn.Module):
    """A block that runs with other tensors for some of its parameters."""

    def __init__(self, block: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.call: Callable[..., Any] = lambda *args, **kwargs: torch.func.functional_call(block, tensors, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def _run(ctx: BlockContext, masters: dict[str, Tensor], i: int) -> Tensor:
    # The rest is detached, or the backward pass would form the gradients of all weights.
    tensors = {n: masters[n].to(p.dtype) if n in masters else p.detach() for n, p in ctx.block.named_parameters()}
    return ctx.call(_Swapped(ctx.block, tensors), ctx.inputs[i], i)


@torch.no_grad()
def _judge(loss: Callable[[int], Tensor], count: int) -> float:
    """The mean loss over the first micro-batches, of `count`."""
    judged = min(_JUDGED, count)
    return sum(loss(i).item() for i in range(judged)) / judged


def _cycle(count: int, seed: int) -> Iterator[int]:
    """Indices of micro-batches in a new random order each time round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@torch.no_grad()
def _write_back(ctx: BlockContext, layers: list[TunedLayer], masters: dict[str, Tensor]) -> None:
    parameters = dict(ctx.block.named_parameters())
    for name, master in masters.items():
        parameters[name].copy_(master)
    for tuned in layers:
        tuned.layer.su.copy_(tuned.su)
        tuned.layer.sv.copy_(tuned.sv)
        bias = dense_parameters(tuned.linear)[1]
        if tuned.layer.bias is not None and bias is not None:
            tuned.layer.bias.copy_(bias)
