"""Uncertainty for active learning: entropy, variation ratio, BALD.

Gal, Islam and Ghahramani, "Deep Bayesian Active Learning with Image Data" (ICML 2017), section 3; BALD is Houlsby et
al. 2011. The posterior is sampled by dropout (Gal and Ghahramani 2016). Shape legend: b examples, m labelled tokens, v
vocabulary, s passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_efficiency.selection.signals import example_signal, labelled, per_example, token_logits


def entropy(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Entropy of the next token in nats, averaged over tokens, (b,)."""
    return example_signal(model, batch, "entropy")


def variation_ratio(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """1 − max p averaged over tokens, (b,)."""
    where, _ = labelled(batch)
    confidence = -example_signal(model, batch, "confidence")
    return torch.where(where.any(1).to(confidence.device), 1 + confidence, -torch.inf)


def bald(
    model: nn.Module, batch: Mapping[str, Any], *, passes: int = 8, dropout: float | None = None, seed: int = 0
) -> Tensor:
    """Mutual information of prediction and weights in nats, H[E p] − E H[p], averaged over tokens, (b,).

    Args:
        model: Runs in evaluation mode but for its dropout.
        batch: Token ids (b, t), mask and labels.
        passes: Samples of the dropout masks.
        dropout: Rate of dropout on the input of the output head; by default the model's own dropout layers are used.
        seed: Of the masks; the global random state is left as it was.

    Raises:
        ValueError: the model has no active dropout and `dropout` is not set.
    """
    if passes < 2:
        raise ValueError(f"passes={passes} must be at least 2: with one there is no disagreement.")
    where, _ = labelled(batch)
    devices = [where.device] if where.device.type == "cuda" else []
    mean_p, mean_entropy = None, None
    with torch.random.fork_rng(devices=devices), stochastic(model, dropout):
        torch.manual_seed(seed)
        for _ in range(passes):
            log_p = F.log_softmax(token_logits(model, batch).float(), -1)
            p = log_p.exp()
            h = -(p * log_p).sum(-1)
            mean_p = p / passes if mean_p is None else mean_p.add_(p, alpha=1 / passes)
            mean_entropy = h / passes if mean_entropy is None else mean_entropy + h / passes
    information = torch.special.entr(mean_p).sum(-1) - mean_entropy
    return per_example(information.clamp(min=0), where)


@contextmanager
def stochastic(model: nn.Module, dropout: float | None) -> Iterator[None]:
    """Dropout is active inside, and nothing else of the training mode."""
    if dropout is not None:
        if not 0 < dropout < 1:
            raise ValueError(f"dropout={dropout} must lie between 0 and 1.")
        head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise ValueError("the model has no output head (get_output_embeddings() is None) to put dropout before.")
        handle = head.register_forward_pre_hook(lambda module, args: (F.dropout(args[0], dropout), *args[1:]))
        try:
            yield
        finally:
            handle.remove()
        return
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    if not layers:
        raise ValueError("the model has no dropout layer with a rate above 0: set dropout=0.1 to add one at its head.")
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode
