"""Perplexity under a reference model: keep a band of it, or what is nearest to the median.

Marion et al., "When Less is More: Investigating Data Pruning for Pretraining LLMs at Scale" (2023): the middle of the
distribution is best; both ends hold noise (high) and repetition (low). Shape legend: b examples, n rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_efficiency.selection.choosing import check_scores, draw, quantile_band, top_k
from hf_efficiency.selection.signals import example_signal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor, nn


def perplexity(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """exp of the mean loss per token, (b,); infinity for an example without a token to predict."""
    loss = example_signal(model, batch, "loss")
    return torch.where(torch.isfinite(loss), loss.double().exp().clamp(max=3e38).float(), torch.inf)


def choose_band(scores: NDArray[np.floating], k: int, low: float, high: float, seed: int) -> NDArray[np.int64]:
    """k rows drawn at random from the band between two quantiles; the band is widened evenly where k needs more."""
    check_scores(scores)
    finite = int(np.isfinite(scores).sum())
    if k > finite:
        raise ValueError(f"k={k} is above the {finite} rows of the pool that have a perplexity.")
    kept = quantile_band(scores, low, high)
    if kept.sum() < k:
        middle = (low + high) / 2
        order = np.argsort(scores, kind="stable")[:finite]
        first = int(np.clip(round(middle * finite - k / 2), 0, finite - k))
        return np.sort(order[first : first + k]).astype(np.int64)
    return draw(kept, k, seed)


def choose_median(scores: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """The k rows whose log-perplexity is nearest to the median, nearest first."""
    check_scores(scores)
    with np.errstate(divide="ignore"):
        logs = np.where(np.isfinite(scores), np.log(np.maximum(scores, 1e-30)), np.nan)
    distance = np.abs(logs - np.nanmedian(logs)) if np.isfinite(logs).any() else logs
    return top_k(np.where(np.isnan(distance), -np.inf, -distance), k)
