"""The attention that caches need: transformers' own, and for keys that come from one of our layers, through that layer.

transformers calls attention by the name in the model's config. Ours are `hf_efficiency_sdpa` and `hf_efficiency_eager`:
the host's function of that name, unless the keys carry a step of one of our cache layers, which then attends itself.
So a model that has them computes as before with every other cache, and without one.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_efficiency.generation.caches.slots import additive, for_heads
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

_PREFIX = "hf_efficiency_"
_STEP = "_hf_efficiency_step"

# query, key, value, mask -> output (b, t, h, d) and weights (b, h, t, n) or None
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


class Step(Protocol):
    """What a cache layer's `update` leaves for the attention that follows."""

    def attend(self, call: "Call", query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Output (b, t, h, d) of the queries; `mask` is over all tokens ever seen."""


class Call:
    """One call of an attention module.

    Attributes:
        module: The attention module.
        attend: The host's attention.
        scale: Of the logits.
        eager: Whether the host's attention returns weights and takes additive masks only.
    """

    def __init__(self, module: nn.Module, attend: Attend, scale: float, eager: bool) -> None:
        self.module, self.attend, self.scale, self.eager = module, attend, scale, eager

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The host's attention under a mask (b, 1, k or h, t, n), boolean or additive."""
        if mask is not None:
            if mask.shape[1] > 1:
                mask = for_heads(mask, query.shape[1])
            if self.eager and mask.dtype == torch.bool:
                mask = additive(mask, query.dtype)
        return self.attend(query, key, value, mask)


def carry(keys: Tensor, step: Step) -> Tensor:
    """The keys as a tensor that tells our attention which step they belong to."""
    tagged = keys.view_as(keys)
    setattr(tagged, _STEP, step)
    return tagged


def can_attend(model: PreTrainedModel) -> bool:
    """Whether the model's attention can be ours."""
    return model._can_set_attn_implementation() and _name(model).removeprefix(_PREFIX) in ("sdpa", "eager")


def use_cache_attention(model: PreTrainedModel) -> None:
    """Lets the model attend through our cache layers. Doing it twice changes nothing.

    Raises:
        ValueError: The model computes attention itself, or with a function that gives no weights.
    """
    register()
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} does not use transformers' attention interface, so tokens can't leave its cache: "
            "use QuantizedKVCache or PagedCache, which keep all of them."
        )
    name = _name(model)
    if name.startswith(_PREFIX):
        return
    if name not in ("sdpa", "eager"):
        raise ValueError(
            f"The model attends with {name!r}; caches that evict need 'sdpa' or 'eager': call "
            "model.set_attn_implementation('sdpa') first."
        )
    model.set_attn_implementation(_PREFIX + name)


def register() -> None:
    """Makes the two attention functions known to transformers."""
    for name, mask, function in (("sdpa", sdpa_mask, _sdpa), ("eager", eager_mask, _eager)):
        AttentionInterface.register(_PREFIX + name, function)
        AttentionMaskInterface.register(_PREFIX + name, mask)


def _name(model: PreTrainedModel) -> str:
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    return _run(sdpa_attention_forward, False, module, query, key, value, attention_mask, kwargs)


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    host = sys.modules[type(module).__module__].eager_attention_forward
    return _run(host, True, module, query, key, value, attention_mask, kwargs)


def _run(
    host: Callable[..., tuple[Tensor, Tensor | None]],
    eager: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    step: Step | None = getattr(key, _STEP, None)
    if step is None:
        return host(module, query, key, value, mask, **kwargs)
    scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    call = Call(module, partial(host, module, **{**kwargs, "scaling": scale}), scale, eager)
    return step.attend(call, query, key, value, mask), None
