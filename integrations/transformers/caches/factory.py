"""All caches by name, and those that were saved."""

from pathlib import Path
from typing import Any

import torch

from hf_efficiency.integrations.transformers.caches.base import EfficientCache, saved_about
from hf_efficiency.integrations.transformers.caches.eviction import (
    H2OCache,
    PriorityCache,
    RandomCache,
    SnapKVCache,
    TOVACache,
)
from hf_efficiency.integrations.transformers.caches.paged import PagedCache
from hf_efficiency.integrations.transformers.caches.quantized import QuantizedKVCache
from hf_efficiency.integrations.transformers.caches.window import RollingCache, StreamingCache
from transformers import PreTrainedModel

CACHES: dict[str, type[EfficientCache]] = {
    cache.name: cache
    for cache in (
        StreamingCache,
        RollingCache,
        H2OCache,
        TOVACache,
        SnapKVCache,
        PriorityCache,
        RandomCache,
        QuantizedKVCache,
        PagedCache,
    )
}


def make_cache(name: str, model: PreTrainedModel, **options: Any) -> EfficientCache:
    """The cache of this name for a model.

    Args:
        name: "streaming", "rolling", "h2o", "tova", "snapkv", "priority", "random", "quantized" or "paged".
        model: The model that will use it.
        options: Arguments of its class.

    Raises:
        TypeError: Options that the class doesn't have, or needs and lacks.
        ValueError: An unknown name, or options out of range.
    """
    if name not in CACHES:
        raise ValueError(f"There is no cache {name!r}: choose one of {', '.join(CACHES)}.")
    return CACHES[name](model, **options)


def load_cache(path: str | Path, model: PreTrainedModel) -> EfficientCache:
    """A cache that `save` wrote, on the model's device.

    Raises:
        ValueError: The file is missing, is no cache, or holds the cache of another model.
    """
    about = saved_about(path)
    cache = make_cache(about["cache"], model, **about["options"])
    cache.restore(path, getattr(model, "device", torch.device("cpu")))
    return cache
