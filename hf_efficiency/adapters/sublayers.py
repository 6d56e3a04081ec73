"""Finds the attention and the feed-forward of each block of a decoder, dense or quantized, by structure.

A block is an element of the list that holds the most linear weights. Attention is a part of it that is told about other
tokens (a mask, positions or a cache); its remaining linear layers are the feed-forward. The width of the hidden states
is the size that most linear layers read or write, and a sub-layer's output projection is the last of its layers that
writes that width: query and key projections, which may do so too, come before it.
"""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from hf_efficiency.calibration.structure import dense_parameters, fused_weights, is_conv1d

if TYPE_CHECKING:
    from collections.abc import Iterator

# Arguments that tell a module about other tokens than its own.
_ABOUT_OTHERS = {"attention_mask", "position_embeddings", "past_key_values", "layer_past", "alibi", "cache_params"}


@dataclass(frozen=True)
class Sublayer:
    """The linear layers of an attention or a feed-forward, by full name.

    Attributes:
        inputs: The layers before the output projection; the first reads the sub-layer's input.
        output: The output projection.
    """

    inputs: tuple[str, ...]
    output: str


def find_attention(model: nn.Module) -> list[Sublayer]:
    """The attention of every block.

    Raises:
        ValueError: A block has none that is made of linear layers.
    """
    width, blocks = _blocks(model)
    found = []
    for prefix, block in blocks:
        mixers = list(_mixers(prefix, block))
        if not mixers:
            raise ValueError(f"{prefix} has no attention to adapt: name linear layers in target_modules.")
        for name, module in mixers:
            found.append(_sublayer(width, name, dict(_linears(name, module))))
    return found


def find_feedforward(model: nn.Module) -> list[Sublayer]:
    """The feed-forward of every block.

    Raises:
        ValueError: A block's is not made of one group of linear layers, as in a mixture of experts.
    """
    width, blocks = _blocks(model)
    found = []
    for prefix, block in blocks:
        mixers = tuple(f"{name}." for name, _ in _mixers(prefix, block))
        layers = {name: sizes for name, sizes in _linears(prefix, block) if not name.startswith(mixers)}
        fused = [name for name in fused_weights(block) if not f"{prefix}.{name}".startswith(mixers)]
        if fused or len({name.rpartition(".")[0] for name in layers}) > 1:
            raise ValueError(
                f"the feed-forward of {prefix} is a mixture of experts and has no single output projection to adapt: "
                "name linear layers in target_modules."
            )
        found.append(_sublayer(width, prefix, layers))
    return found


def block_names(model: nn.Module) -> list[str]:
    """Full names of the blocks, in their order."""
    return [name for name, _ in _blocks(model)[1]]


def _sublayer(width: int, where: str, layers: dict[str, tuple[int, int]]) -> Sublayer:
    outputs = [name for name, (_, d_out) in layers.items() if d_out == width]
    if not outputs or len(layers) == 1:
        raise ValueError(f"{where} has no output projection of {width} features: name linear layers in target_modules.")
    return Sublayer(tuple(name for name in layers if name != outputs[-1]), outputs[-1])


def _blocks(model: nn.Module) -> tuple[int, list[tuple[str, nn.Module]]]:
    """The width of the hidden states, and the blocks by name."""
    best, size, sizes = [], 0, Counter[int]()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(child) for child in module}) != 1:
            continue
        linears = [both for _, both in _linears(name, module)]
        total = sum(d_in * d_out for d_in, d_out in linears)
        if total > size:
            best, size, sizes = [(f"{name}.{i}", child) for i, child in enumerate(module)], total, Counter()
            for both in linears:
                sizes.update(both)
    if not best:
        raise ValueError(f"{type(model).__name__} has no list of blocks with linear layers to adapt.")
    return sizes.most_common(1)[0][0], best


def _mixers(prefix: str, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules inside a block that are told about other tokens."""
    for name, child in block.named_children():
        full = f"{prefix}.{name}"
        if _ABOUT_OTHERS & _arguments(child):
            yield full, child
        else:
            yield from _mixers(full, child)


def _arguments(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


def _linears(prefix: str, module: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Linear layers below a module with (d_in, d_out); what an adapter puts inside them is left out."""
    for name, child in module.named_children():
        full = f"{prefix}.{name}" if prefix else name
        sizes = _sizes(child)
        if sizes is None:
            yield from _linears(full, child)
        else:
            yield full, sizes


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    if is_conv1d(module):
        rows, columns = dense_parameters(module)[0].shape
        return rows, columns
    d_in, d_out = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return (d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None
