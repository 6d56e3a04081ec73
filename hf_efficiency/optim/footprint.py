"""What an optimizer keeps in memory: counted, and by formula."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from hf_efficiency.optim.low_rank import low_rank_bytes
from hf_efficiency.optim.moments import MIN_8BIT_SIZE, moment_bytes
from hf_efficiency.optim.options import GaLoreOptions


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Bytes that an optimizer keeps alive: the whole storage of each tensor of its state, counters aside.

    Works for any optimizer, also for one that hides tensors in objects inside its state.
    """
    storages: dict[int, int] = {}
    todo: list[Any] = list(optimizer.state.values())
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            if value.ndim:
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
        elif hasattr(value, "__dict__"):
            todo += vars(value).values()
    return sum(storages.values())


def formula_bytes(param_groups: Iterable[dict[str, Any]]) -> int:
    """Bytes that `GaLoreAdamW` keeps by its formula: projected moments, projections, and whole moments of the rest.

    Args:
        param_groups: As an optimizer holds them.
    """
    total = 0
    for group in param_groups:
        options = GaLoreOptions.of(group)
        for parameter in group["params"]:
            size = parameter.element_size()
            if options.rank is not None:
                total += low_rank_bytes(parameter.shape, options, size)
            else:
                bits = 32 if parameter.numel() < MIN_8BIT_SIZE else options.state_bits
                total += moment_bytes(parameter.numel(), bits, max(size, 4))
    return total
