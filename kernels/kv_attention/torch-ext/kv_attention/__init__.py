"""Attention for decoding over a dense or a quantized key-value cache, with the attention that each key received."""

from . import layers
from .op import decode_attention, quantized_decode_attention
from .reference import Quantized, dequantize_keys, dequantize_values, quantize_keys, quantize_values

__all__ = [
    "Quantized",
    "decode_attention",
    "dequantize_keys",
    "dequantize_values",
    "layers",
    "quantize_keys",
    "quantize_values",
    "quantized_decode_attention",
]
