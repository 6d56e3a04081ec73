"""Linear layers whose weights are 4-bit codes into lookup tables: NF4, FP4 and k-means codebooks."""

from . import layers
from .op import lut_linear, row_lut_linear

__all__ = ["layers", "lut_linear", "row_lut_linear"]
