"""Finds a decoder's blocks and its linear layers by structure, never by a model's name.

Shape legend: d_in, d_out features.
"""

import logging
from collections.abc import Iterable
from functools import cache, partial

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_FUSED_DIMS = 3
_NAMED = 4  # names that a warning spells out


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D` (GPT-2): a linear layer whose weight is (d_in, d_out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and not isinstance(module, nn.Conv1d)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a dense linear layer that can be compressed."""
    kind: type = type(module)
    return kind is nn.Linear or is_conv1d(module) or _only_writes_product(kind)


@cache
def _only_writes_product(kind: type) -> bool:
    """Whether a subclass of `nn.Linear` (no other class) adds a `forward` alone, which computes what its base's does.

    So Falcon's layers count as dense, but no layer of another package that stores or adapts its weight in its own way.
    """
    if kind.__base__ is not nn.Linear or {n for n in vars(kind) if not n.startswith("__")} != {"forward"}:
        return False
    probe = nn.utils.skip_init(kind, 3, 2, device="cpu", dtype=torch.float32)
    values = partial(torch.tensor, device="cpu")  # also while a model is made on the meta device
    x = values([[[1.0, -2.0, 4.0]]])
    with torch.no_grad():
        probe.weight.copy_(values([[1.0, 3.0, -5.0], [7.0, 2.0, 6.0]]))
        probe.bias.copy_(values([8.0, -9.0]))
        return torch.equal(probe(x), nn.functional.linear(x, probe.weight, probe.bias))


def dense_parameters(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a dense linear layer, as the module holds them (plain tensors inside `functional_call`)."""
    weight, bias = linear.weight, linear.bias
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        raise TypeError(f"{type(linear).__name__} holds no dense weight.")
    return weight, bias


def linear_sizes(linear: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a dense linear layer."""
    rows, columns = dense_parameters(linear)[0].shape
    return (rows, columns) if is_conv1d(linear) else (columns, rows)


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a dense linear layer as (d_out, d_in), a view without a gradient."""
    weight = dense_parameters(linear)[0].detach()
    return weight.T if is_conv1d(linear) else weight


def set_weight_(linear: nn.Module, weight: Tensor) -> None:
    """Overwrites the weight of a dense linear layer by `weight` (d_out, d_in), cast to its dtype."""
    weight_of(linear).copy_(weight)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its name: the `ModuleList` of one class that holds the most linear weights.

    Raises:
        ValueError: If no module list holds linear layers.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if len({type(child) for child in module}) != 1:
            continue
        linears = [m for m in module.modules() if is_linear(m)]
        size = sum(dense_parameters(m)[0].numel() for m in linears)
        if linears and (best is None or size > best[0]):
            best = (size, name, module)
    if best is None:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks with linear layers, so there is nothing to compress. "
            "Pass a decoder whose blocks lie in a torch.nn.ModuleList."
        )
    return best[1], best[2]


def linears_of(prefix: str, module: nn.Module) -> dict[str, nn.Module]:
    """Dense linear layers below `module`, by full name."""
    return {f"{prefix}.{name}" if prefix else name: m for name, m in module.named_modules() if name and is_linear(m)}


def fused_weights(module: nn.Module) -> list[str]:
    """Names of 3-D parameters (fused expert weights), which no linear-layer method reaches."""
    return [name for name, p in module.named_parameters() if p.ndim == _FUSED_DIMS and min(p.shape) > 1]


def warn_of_fused_weights(prefix: str, blocks: nn.ModuleList) -> None:
    """Logs one warning that names fused expert weights below `blocks`, which stay dense."""
    names = [f"{prefix}.{name}" for name in fused_weights(blocks)]
    if names:
        logger.warning(
            "%d fused expert weights stay dense, for only linear layers are compressed: %s%s.",
            len(names),
            ", ".join(names[:_NAMED]),
            ", ..." if len(names) > _NAMED else "",
        )


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule called `name`."""
    root.set_submodule(name, module)


def first_tensor(output: Tensor | Iterable[object]) -> Tensor:
    """The hidden states of a block's output, which is a tensor or a tuple that starts with it."""
    if isinstance(output, Tensor):
        return output
    first = next(iter(output))
    if not isinstance(first, Tensor):
        raise ValueError(f"A block returned {type(first).__name__} where hidden states were expected.")
    return first
