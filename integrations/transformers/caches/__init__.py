"""Key-value caches for `model.generate(..., past_key_values=cache)`."""

from hf_efficiency.integrations.transformers.caches.convert import ConversionReport, convert_attention
from hf_efficiency.integrations.transformers.caches.eviction import (
    H2OCache,
    PriorityCache,
    RandomCache,
    SnapKVCache,
    TOVACache,
)
from hf_efficiency.integrations.transformers.caches.factory import CACHES, load_cache, make_cache
from hf_efficiency.integrations.transformers.caches.paged import PagedCache
from hf_efficiency.integrations.transformers.caches.quantized import QuantizedKVCache
from hf_efficiency.integrations.transformers.caches.window import RollingCache, StreamingCache

__all__ = [
    "CACHES",
    "ConversionReport",
    "H2OCache",
    "PagedCache",
    "PriorityCache",
    "QuantizedKVCache",
    "RandomCache",
    "RollingCache",
    "SnapKVCache",
    "StreamingCache",
    "TOVACache",
    "convert_attention",
    "load_cache",
    "make_cache",
]
