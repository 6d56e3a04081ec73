"""Runs a causal model and keeps what distillation needs of it: inputs of the head, states of some blocks, attention.

Shape legend: b batch, t tokens, n rows (tokens with a label), d features, h heads, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_efficiency.calibration.structure import first_tensor


@dataclass
class Trace:
    """What one forward pass left.

    Attributes:
        hidden: (b, t, d), the input of the output head.
        logits: (b, t, V) if asked for, else (b, 1, V), those of the first token.
        states: The output (b, t, d) of each block asked for.
        attentions: (b, h, t, t) of each block asked for.
    """

    hidden: Tensor
    logits: Tensor
    states: dict[int, Tensor] = field(default_factory=dict)
    attentions: dict[int, Tensor] = field(default_factory=dict)


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The list of a model's blocks, whatever their weights are stored in.

    Raises:
        ValueError: The model has no list of modules.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no blocks in a torch.nn.ModuleList, so layers can't be matched.")
    # Lists of experts are shorter than their block, or their length differs from that of the config.
    return max(lists, key=lambda blocks: (len(blocks) == count, _size(blocks)))


def _size(module: nn.Module) -> int:
    return sum(t.numel() for tensors in (module.parameters(), module.buffers()) for t in tensors)


def trace(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    layers: Collection[int] = (),
    attentions: Collection[int] = (),
    full_logits: bool = False,
    call: Callable[..., Any] | None = None,
) -> Trace:
    """Runs the model on `inputs`, all but its output head, which sees the first token only.

    Args:
        model: A causal language model, or a PEFT model around one.
        inputs: Of its forward method, without labels.
        layers: Blocks whose output is wanted, counted from 0.
        attentions: Blocks whose attention is wanted. The model must compute it ("eager").
        full_logits: Whether the logits of all tokens are wanted.
        call: What to call in the model's place: a wrapper (DistributedDataParallel) around it.

    Raises:
        ValueError: The model does not call its head, or gives no attention.
    """
    length = inputs["input_ids"].shape[1]
    captured: list[Tensor] = []
    states: dict[int, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(_head_input(model.get_output_embeddings(), captured, None if full_logits else length))
        if layers:
            blocks = decoder_blocks(model)
            for i in layers:
                stack.enter_context(_block_output(blocks[i], i, states))
        extra = {"output_attentions": True} if attentions else {}
        output = (model if call is None else call)(**inputs, use_cache=False, return_dict=True, **extra)
    if not captured:
        raise ValueError(
            f"{type(model).__name__} does not call its output embeddings, so its head can't be taken out: set "
            "chunked=False."
        )
    # virtual tokens of prompt learning come first, and have no labels
    result = Trace(captured[0][:, -length:], output.logits[:, -length:])
    result.states = {i: state[:, -length:] for i, state in states.items()}
    if attentions:
        result.attentions = {i: _attention(output.attentions, i, type(model).__name__) for i in attentions}
    return result


@contextmanager
def _head_input(head: nn.Module, captured: list[Tensor], length: int | None) -> Iterator[None]:
    """Keeps what the head is given; with a length, the head sees only the first of so many last tokens."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        captured.append(args[0])
        return None if length is None else (args[0][:, -length:][:, :1], *args[1:])

    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _block_output(block: nn.Module, index: int, states: dict[int, Tensor]) -> Iterator[None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        states[index] = first_tensor(output)

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _attention(found: Any, index: int, name: str) -> Tensor:
    attention = found[index] if found is not None and index < len(found) else None
    if not isinstance(attention, Tensor):
        raise ValueError(
            f"{name} gave no attention maps of block {index}: load it with attn_implementation='eager', which computes "
            "them."
        )
    return attention
