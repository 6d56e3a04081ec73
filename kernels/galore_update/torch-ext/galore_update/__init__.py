"""GaLore's weight update: Adam in a low-rank space of the gradient, without full-size intermediates."""

from . import layers
from .op import dequantize_state, galore_update_, galore_update_8bit_, quantize_state

__all__ = ["dequantize_state", "galore_update_", "galore_update_8bit_", "layers", "quantize_state"]
