"""Fast Walsh-Hadamard transforms with sign flips, in one pass over memory."""

from . import layers
from .op import hadamard

__all__ = ["hadamard", "layers"]
