"""Products with weights of 2, 3, 4 and 8 bits, straight from the tensors of GPTQ and AWQ checkpoints."""

from . import layers
from .op import awq_linear, gptq_linear

__all__ = ["awq_linear", "gptq_linear", "layers"]
