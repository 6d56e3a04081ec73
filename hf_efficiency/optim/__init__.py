"""Optimizers whose states take less memory than the weights."""

from hf_efficiency.optim.footprint import formula_bytes, optimizer_bytes
from hf_efficiency.optim.galore import GaLoreAdamW
from hf_efficiency.optim.options import VARIANTS, GaLoreOptions, variant_options

__all__ = [
    "VARIANTS",
    "GaLoreAdamW",
    "GaLoreOptions",
    "formula_bytes",
    "optimizer_bytes",
    "variant_options",
]
