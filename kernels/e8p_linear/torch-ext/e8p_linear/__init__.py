"""Multiplies with the lattice codes of QuIP#, decoded in registers."""

from . import layers
from .op import e8p_decode, e8p_linear
from .tables import e8p_tables

__all__ = ["e8p_decode", "e8p_linear", "e8p_tables", "layers"]
