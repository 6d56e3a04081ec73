"""Finds a model's rotary embedding by its structure."""

import sys
from typing import Any

import torch
from torch import Tensor

from hf_efficiency.generation.caches.rotation import Rotary
from transformers import PreTrainedModel

# Their frequencies do not depend on the text's length.
_FIXED = ("default", "linear", "llama3", "yarn", "proportional")


def find_rotary(model: PreTrainedModel, attention: Any, layer: int) -> Rotary | None:
    """The rotary embedding of an attention module, or None where positions enter in another way.

    Args:
        model: The model.
        attention: The module.
        layer: Its number.
    """
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else ""
    names = (f"{kind}_inv_freq", "inv_freq")
    buffers = [(module, name) for module in model.modules() for name in names if hasattr(module, name)]
    if apply is None or not buffers:
        return None
    module, name = buffers[0]
    rope_type = getattr(module, "rope_type", "default")
    if isinstance(rope_type, dict):
        rope_type = rope_type.get(kind, "default")
    frequencies: Tensor = getattr(module, name)
    if rope_type not in _FIXED:
        return None
    interleaved = _pairs_neighbours(apply, 2 * frequencies.shape[0], frequencies.device)
    return None if interleaved is None else Rotary(frequencies, interleaved)


def _pairs_neighbours(apply: Any, size: int, device: torch.device) -> bool | None:
    """Which numbers a rotation mixes, seen by turning a unit vector by a right angle; None if it is no rotation."""
    unit = torch.zeros(1, 1, 1, size, device=device)
    unit[..., 0] = 1
    cos, sin = torch.zeros(1, 1, size, device=device), torch.ones(1, 1, size, device=device)
    try:
        turned = apply(unit, unit, cos, sin)[0].flatten()
    except (TypeError, RuntimeError):  # a function of that name with other arguments
        return None
    place = int(turned.abs().argmax())
    if turned.shape[0] != size or place not in (1, size // 2) or float(turned[place]) != 1:
        return None
    return place == 1 and size > 2
