"""Taking singular directions out of the adapters of a model, for good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_efficiency.integrations.peft.base import AdapterLinear

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from hf_efficiency.adapters.base import LinearAdapter


def trained_adapters(model: nn.Module, kind: type[LinearAdapter]) -> tuple[str, dict[str, Any]]:
    """The adapter of a type that is being trained, and its layers by their name in the base model.

    Raises:
        ValueError: More than one is trained at once.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, AdapterLinear):
            for adapter_name, adapter in module.adapters.items():
                if isinstance(adapter, kind) and any(p.requires_grad for p in adapter.parameters()):
                    found.setdefault(adapter_name, {})[name.removeprefix("base_model.model.")] = adapter
    if len(found) > 1:
        raise ValueError(f"the ranks of one adapter are adapted at a time, and these are trained: {', '.join(found)}.")
    return next(iter(found.items()), ("", {}))


def prune(
    config: Any, adapters: Mapping[str, Any], rows: Mapping[str, Tensor], optimizer: Optimizer | None = None
) -> None:
    """Keeps the directions of the masks `rows` (r,) only, and notes the new ranks in the config.

    The optimizer's state is cut alike, so that training can go on.
    """
    pattern = dict(config.rank_pattern or {})
    for name, adapter in adapters.items():
        before = {id(parameter): parameter.shape for parameter in adapter.directions}
        for parameter, dim in adapter.keep(rows[name]):
            _cut_state(optimizer, parameter, before[id(parameter)], rows[name], dim)
        pattern[name] = adapter.e.numel()
    config.rank_pattern = pattern


def _cut_state(optimizer: Any, parameter: nn.Parameter, shape: Any, rows: Tensor, dim: int) -> None:
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    for key, value in state.items():
        if getattr(value, "shape", None) == shape:
            state[key] = value.index_select(dim, rows.nonzero()[:, 0].to(value.device))
