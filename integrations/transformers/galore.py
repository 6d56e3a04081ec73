"""GaLore in any `Trainer`: which weights are projected, and what `optimizer_cls_and_kwargs` wants."""

import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from torch import nn

from hf_efficiency.adapters.targets import no_match
from hf_efficiency.optim import GaLoreAdamW, variant_options
from transformers.pytorch_utils import Conv1D

Targets = str | Iterable[str]


class GaLoreFactory:
    """Builds the optimizer for the model that a Trainer has when training starts."""

    def __call__(self, model: nn.Module, **settings: Any) -> GaLoreAdamW:
        """The optimizer. `settings` are those that `galore` returns."""
        grouping = {name: settings.pop(name) for name in ("target_modules", "exclude_modules", "embeddings", "options")}
        groups = galore_param_groups(model, weight_decay=settings.pop("weight_decay"), **grouping)
        return GaLoreAdamW(groups, **settings)


def galore(
    model: nn.Module,
    variant: str | None = None,
    *,
    args: Any = None,
    target_modules: Targets | None = None,
    exclude_modules: Targets | None = None,
    embeddings: bool = False,
    lr: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    per_layer: bool = False,
    **options: Any,
) -> tuple[type[GaLoreFactory], dict[str, Any]]:
    """What makes a Trainer train with GaLore: `Trainer(..., optimizer_cls_and_kwargs=galore(model, rank=64))`.

    The weights of the targets are projected; all other trainable parameters get ordinary AdamW. Weight decay spares
    biases and norms, as Trainer does. Trainer does not hand its own settings to an optimizer of this kind: give them
    here, or give `args`.

    Args:
        model: The model to be trained. It is checked here, before any long work, and not changed.
        variant: A row of `hf_efficiency.optim.VARIANTS`; `"galore"` by default.
        args: The `TrainingArguments`: learning rate, weight decay, betas and epsilon are theirs unless given here.
        target_modules: `"all-linear"` (the default): every linear layer but the output head. Or names (or their
            endings), or one regular expression for whole names.
        exclude_modules: Names, endings or a regular expression of layers that are not projected.
        embeddings: Project the token embeddings and the output head, too.
        lr: Learning rate η (1e-2 without `args`); projected weights move by η `scale`.
        betas: Of Adam (0.9, 0.999).
        eps: Of Adam (1e-8).
        weight_decay: Decoupled (0).
        per_layer: Update during the backward pass, see `GaLoreAdamW`.
        **options: Fields of `hf_efficiency.optim.GaLoreOptions`: `rank`, `update_proj_gap`, `scale`, `projection`, ...

    Raises:
        ValueError: Targets that match nothing, or that are quantized or frozen; a rank above a matrix's; values out of
            range; `args` that do not go with `per_layer`.
    """
    adapter = getattr(model, "galore_settings", None)  # a model with a GaLoreConfig knows its options and weights
    if adapter is not None:
        if target_modules is not None or exclude_modules is not None:
            raise ValueError("The model's GaLoreConfig says which weights are trained: leave target_modules out.")
        variant, options = variant or adapter["variant"], {**adapter["options"], **options}
    settings = {
        "target_modules": "all-linear" if target_modules is None else target_modules,
        "exclude_modules": exclude_modules,
        "embeddings": embeddings,
        "options": asdict(variant_options(variant or "galore", **options)),
        "lr": _first(lr, getattr(args, "learning_rate", None), 1e-2),
        "betas": _first(betas, args and (args.adam_beta1, args.adam_beta2), (0.9, 0.999)),
        "eps": _first(eps, getattr(args, "adam_epsilon", None), 1e-8),
        "weight_decay": _first(weight_decay, getattr(args, "weight_decay", None), 0.0),
        "per_layer": per_layer,
    }
    if per_layer and args is not None:
        _check_per_layer(args)
    GaLoreFactory()(model, **{**settings, "per_layer": False})
    return GaLoreFactory, settings


def galore_param_groups(
    model: nn.Module,
    *,
    options: dict[str, Any],
    target_modules: Targets = "all-linear",
    exclude_modules: Targets | None = None,
    embeddings: bool = False,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for `GaLoreAdamW`: projected or not, with weight decay or not; empty ones left out.

    Args:
        model: Its trainable parameters are grouped, each once.
        options: Fields of `GaLoreOptions` for the projected groups; `state_bits` holds for all.
        target_modules: As for `galore`.
        exclude_modules: As for `galore`.
        embeddings: As for `galore`.
        weight_decay: Of the groups that have it.

    Raises:
        ValueError: As for `galore`.
    """
    from transformers import Trainer

    adapter_weights = getattr(model, "galore_weights", None)
    if adapter_weights is None:
        modules = list(_matching(model, target_modules, exclude_modules).values())
        weights = [module.weight for module in modules]
    else:
        weights = adapter_weights()
    if embeddings:
        weights += [module.weight for module in _embeddings(model)]
    projected = {id(weight) for weight in weights}
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # reads the model alone
    groups: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = {
        (low, decay): [] for low in (True, False) for decay in (True, False)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[id(parameter) in projected, name in decayed].append((name, parameter))
    return [
        {"params": named, "weight_decay": weight_decay if decay else 0.0, **(options if low else _dense(options))}
        for (low, decay), named in groups.items()
        if named
    ]


def _dense(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a group that is not projected."""
    return {"rank": None, "state_bits": options["state_bits"]}


def _matching(model: nn.Module, targets: Targets, exclude: Targets | None) -> dict[str, Any]:
    """The layers whose weights are projected, by name."""
    linears: dict[str, Any] = {
        n: module for n, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    everything = isinstance(targets, str) and targets == "all-linear"
    if everything:
        chosen = {name: module for name, module in linears.items() if not _in_head(model, module)}
    else:
        targets = targets if isinstance(targets, str) else list(targets)
        chosen = {name: module for name, module in linears.items() if _matches(name, targets)}
    if exclude is not None:
        exclude = exclude if isinstance(exclude, str) else list(exclude)
        chosen = {name: module for name, module in chosen.items() if not _matches(name, exclude)}
    quantized = [name for name, module in chosen.items() if not _is_dense(module)]
    if quantized or (not chosen and getattr(model, "is_quantized", False)):
        layer = f"{quantized[0]} is a {type(chosen[quantized[0]]).__name__}" if quantized else "its layers are"
        raise ValueError(
            f"GaLore trains weights themselves, and {layer} quantized: there is no weight to train. Name the dense "
            "layers in target_modules, load the model without quantization_config, make it dense with "
            "model.dequantize(), or train adapters (LoRA) with an ordinary optimizer."
        )
    if not chosen:
        raise ValueError(no_match(targets, linears, "linear layer"))
    frozen = [name for name, module in chosen.items() if not module.weight.requires_grad]
    if frozen and (not everything or len(frozen) == len(chosen)):
        raise ValueError(
            f"The weight of {frozen[0]} is frozen, as are {len(frozen) - 1} other targets: call requires_grad_(True) "
            "on what GaLore is to train, or leave it out of target_modules."
        )
    return {name: module for name, module in chosen.items() if name not in frozen}


def _in_head(model: nn.Module, module: nn.Module) -> bool:
    """Whether a layer is the output head: what the model has beside its decoder, or its output embeddings."""
    body = getattr(model, "base_model", model)
    read_head = getattr(model, "get_output_embeddings", None)
    if read_head is not None and read_head() is module:
        return True
    return isinstance(body, nn.Module) and all(inner is not module for inner in body.modules())


def _embeddings(model: nn.Module) -> list[Any]:
    """Token embeddings and output head, where they have a trainable matrix."""
    readers = (getattr(model, name, lambda: None) for name in ("get_input_embeddings", "get_output_embeddings"))
    modules = [module for module in (read() for read in readers) if module is not None]
    found = [module for module in modules if _is_dense(module) and module.weight.requires_grad]
    if not found:
        raise ValueError(f"embeddings=True: {type(model).__name__} has no trainable token embeddings.")
    return found


def _matches(name: str, targets: str | list[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _is_dense(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.is_floating_point()


def _check_per_layer(args: Any) -> None:
    """ValueError for training arguments that an update during the backward pass would silently break."""
    for name, allowed in (("gradient_accumulation_steps", 1), ("max_grad_norm", 0), ("fp16", False)):
        value = getattr(args, name)
        if value and value != allowed:
            raise ValueError(
                f"per_layer=True frees each gradient as soon as its weight is updated, and {name}={value} needs them "
                f"afterwards: set {name}={allowed}, or leave per_layer out."
            )


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
