"""Records how a model calls its blocks, so that each block can be run alone.

Shape legend: b sequences of a micro-batch, t tokens, d hidden size.
"""

from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficiency.calibration.precision import cast_floating
from hf_efficiency.calibration.structure import is_linear


class _SeenEnough(Exception):
    """Ends a forward pass once what was looked for is known."""


@dataclass
class BlockCall:
    """The arguments a model gave one block, with the hidden states left out."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    hidden_in_kwargs: bool = False

    def cast(self, dtype: torch.dtype) -> "BlockCall":
        """The same call with its floating tensors (rotary tables, masks) in `dtype`."""
        return BlockCall(cast_floating(self.args, dtype), cast_floating(self.kwargs, dtype), self.hidden_in_kwargs)

    def __call__(self, block: nn.Module, hidden: Tensor) -> Any:
        """Calls `block` on other hidden states."""
        if self.hidden_in_kwargs:
            return block(*self.args, **{**self.kwargs, "hidden_states": hidden})
        return block(hidden, *self.args, **self.kwargs)


@dataclass
class Trace:
    """What one forward pass showed: each block's call, and its linear layers grouped by the tensor they read."""

    hidden: Tensor
    calls: list[BlockCall]
    groups: list[list[list[str]]]
    returns: list[Any]  # what each block returns beside the hidden states: a tuple's other items, or None


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    kwargs = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "past_key_value", "layer_past")}
    if args:
        return args[0], BlockCall(args[1:], kwargs)
    hidden = kwargs.pop("hidden_states")
    return hidden, BlockCall((), kwargs, hidden_in_kwargs=True)


@torch.no_grad()
def first_hidden(model: nn.Module, blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
    """The input (b, t, d) of the first block for token ids (b, t)."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_split(args, kwargs)[0])
        raise _SeenEnough

    handle = blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(input_ids=tokens, use_cache=False)
    except _SeenEnough:
        return found[0]
    finally:
        handle.remove()
    raise ValueError(f"{type(model).__name__} never called its first block; it can't be calibrated block by block.")


@torch.no_grad()
def trace(model: nn.Module, blocks: nn.ModuleList, tokens: Tensor) -> Trace:
    """Runs the model once on token ids (b, t) and records every block's call and its linears' shared inputs."""
    hidden: list[Tensor] = []
    calls: list[BlockCall] = []
    groups: list[list[list[str]]] = []
    returns: list[Any] = []
    current: dict[int, list[str]] = {}
    alive: list[Tensor] = []  # keeps inputs alive within a block, so that an id stands for one tensor

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state, call = _split(args, kwargs)
        if not calls:
            hidden.append(state)
        calls.append(call)
        current.clear()
        alive.clear()

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        groups.append(list(current.values()))
        returns.append(output[1:] if isinstance(output, tuple) else None)

    def reach_head(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _SeenEnough  # the output head may cost as much as several blocks

    def linear_hook(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not any(name in members for members in current.values()):
                alive.append(args[0])
                current.setdefault(_identity(args[0]), []).append(name)

        return hook

    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    with ExitStack() as stack:
        if isinstance(head, nn.Module):
            stack.callback(head.register_forward_pre_hook(reach_head).remove)
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave).remove)
            for name, module in block.named_modules():
                if is_linear(module):
                    stack.callback(module.register_forward_pre_hook(linear_hook(name)).remove)
        with suppress(_SeenEnough):
            model(input_ids=tokens, use_cache=False)
    if len(calls) != len(blocks):
        raise ValueError(
            f"{type(model).__name__} called {len(calls)} of its {len(blocks)} blocks in one pass; block-by-block "
            "calibration needs each block exactly once."
        )
    return Trace(hidden[0], calls, groups, returns)


@torch.no_grad()
def trace_calls(model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, returns: list[Any]) -> list[BlockCall]:
    """How the model calls its blocks on token ids (b, t), with blocks that only hand their input on.

    Args:
        model: As for `trace`.
        blocks: Its blocks.
        tokens: As for `trace`.
        returns: `Trace.returns` of another micro-batch.
    """
    calls: list[BlockCall] = []

    def stand_in(rest: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            state, call = _split(args, kwargs)
            calls.append(call)
            if len(calls) == len(blocks):
                raise _SeenEnough
            return state if rest is None else (state, *rest)

        return forward

    with ExitStack() as stack:
        for block, rest in zip(blocks, returns, strict=True):
            block.forward = stand_in(rest)
            stack.callback(block.__dict__.pop, "forward")
        with suppress(_SeenEnough):
            model(input_ids=tokens, use_cache=False)
    return calls


def _identity(x: Tensor) -> int:
    """Equal for tensors that are views of the same values (a reshape of one input, say)."""
    return hash((x.data_ptr(), x.numel()))


def same_calls(first: list[BlockCall], second: list[BlockCall]) -> bool:
    """Whether two batches gave every block the same arguments (masks and rotary tables, not token contents)."""
    return all(_equal(a.args, b.args) and _equal(a.kwargs, b.kwargs) for a, b in zip(first, second, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return a is b or bool(a == b)
