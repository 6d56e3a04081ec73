"""What is checked before an optimizer is built or resumed, with messages that say the cure."""

import difflib
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from hf_efficiency.optim.low_rank import stands_right
from hf_efficiency.optim.options import OPTION_NAMES, GaLoreOptions

GROUP_KEYS = {"params", "param_names", "lr", "initial_lr", "betas", "eps", "weight_decay", *OPTION_NAMES}


def check_keys(given: Iterable[str], known: Iterable[str]) -> None:
    """ValueError for an option that does not exist, near misses named."""
    known = sorted(known)
    for key in given:
        if key not in known:
            near = ["side"] if key == "proj_type" else difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"GaLoreAdamW has no option {key!r}.{hint} It has {', '.join(known)}.")


def check_group(group: dict[str, Any]) -> None:
    """ValueError or TypeError for a group that can't be trained as it asks for."""
    beta1, beta2 = group["betas"]
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas={group['betas']} must both lie in [0, 1).")
    for name in ("lr", "eps", "weight_decay"):
        if not float(group[name]) >= 0:
            raise ValueError(f"{name}={group[name]} can't be negative.")
    options = GaLoreOptions.of(group)
    names = group.get("param_names", [None] * len(group["params"]))
    for name, parameter in zip(names, group["params"], strict=True):
        label = f"The weight {name!r}" if name else "A weight"
        if not parameter.is_floating_point():
            raise ValueError(f"{label} is {parameter.dtype}: a quantized or integer weight can't be trained itself.")
        if options.rank is None:
            continue
        shape = tuple(parameter.shape)
        if parameter.ndim != 2:
            raise ValueError(f"{label} of shape {shape} is no matrix: put it into a group with rank=None.")
        if options.rank > min(shape):
            raise ValueError(
                f"rank={options.rank} is above {min(shape)}, all the rank that {label[0].lower()}{label[1:]} of shape "
                f"{shape} can have: choose a smaller rank, or put it into a group with rank=None."
            )
        if hasattr(parameter, "placements"):
            raise ValueError(f"{label} is sharded (DTensor): GaLore needs whole gradients. Train with DDP, not FSDP.")


def check_same_options(groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> None:
    """ValueError where a saved state was made with other options."""
    sizes, saved_sizes = ([len(group["params"]) for group in many] for many in (groups, saved_groups))
    if sizes != saved_sizes:
        raise ValueError(
            f"The saved optimizer has groups of {saved_sizes} parameters, this one of {sizes}: it was made for other "
            "target modules or another model. Build the optimizer as it was built before, or start afresh."
        )
    for position, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        changed = [
            f"{name}={saved.get(name)!r} (now {group[name]!r})"
            for name in OPTION_NAMES
            if saved.get(name) != group[name]
        ]
        if changed:
            raise ValueError(
                f"The saved optimizer has other options in group {position}: {', '.join(changed)}. Resume with the "
                "options it was made with, or start afresh."
            )


def check_shapes(parameter: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> None:
    """ValueError where a saved state belongs to a weight of another shape."""
    options, shape = GaLoreOptions.of(group), tuple(parameter.shape)
    if options.rank is not None:
        m, n = shape
        shape = (m, options.rank) if stands_right(shape, options.side) else (options.rank, n)
    found = tuple(saved["exp_avg"].shape)
    if found != shape:
        raise ValueError(
            f"The saved state of a weight has moments {found}; a weight {tuple(parameter.shape)} needs {shape}: it was "
            "saved for another model, or the weights stand in another order."
        )
