"""RMSNorm and the gated MLP of Llama-like decoders, each in one pass over memory."""

from . import layers
from .op import rms_norm, silu_mul

__all__ = ["layers", "rms_norm", "silu_mul"]
