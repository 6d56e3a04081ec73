"""A cheap check of candidate data: a few steps of a nearly trained model.

Wang et al., "Ultra-FineWeb" (2025), section 3.1: near the end of training, with a falling learning rate, a small amount
of data already moves the loss, so that seeds and candidates can be compared at a thousandth of the cost of training
from scratch. Shape legend: b examples, t tokens.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from hf_efficiency.selection.signals import labelled, scoring, token_logits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn


@dataclass(frozen=True)
class Verification:
    """Settings of the short training.

    Attributes:
        steps: Optimizer steps, the same for every candidate; its batches are repeated where there are fewer.
        learning_rate: At the start; it falls linearly to zero.
        seed: Of dropout, the same for every candidate.
    """

    steps: int = 20
    learning_rate: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1.")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive.")

    def gains(
        self,
        model: nn.Module,
        candidates: Mapping[str, Sequence[Mapping[str, Any]]],
        evaluation: Sequence[Mapping[str, Any]],
    ) -> dict[str, float]:
        """How far each candidate's batches lower the loss on the evaluation batches, in nats a token; higher is better.

        `model` itself is not changed: a copy is trained for each candidate.

        Raises:
            ValueError: no candidate, or one without batches.
        """
        if not candidates or not evaluation or not all(candidates.values()):
            raise ValueError("the check needs at least one candidate, batches in each of them, and evaluation batches.")
        before, after = self.losses(model, candidates, {"evaluation": evaluation})
        return {name: before[0] - after[i][0] for i, name in enumerate(candidates)}

    def losses(
        self,
        model: nn.Module,
        candidates: Mapping[str, Sequence[Mapping[str, Any]]],
        evaluations: Mapping[str, Sequence[Mapping[str, Any]]],
    ) -> tuple[list[float], list[list[float]]]:
        """Losses of each evaluation before, (e,), and after training on each candidate alone, (s, e).

        They are what `skill_it.learn_graph` makes a skill graph of.
        """
        before = [mean_loss(model, batches) for batches in evaluations.values()]
        after = []
        for data in candidates.values():
            trained = self._trained(model, data)
            after.append([mean_loss(trained, batches) for batches in evaluations.values()])
        return before, after

    def _trained(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> nn.Module:
        trained = copy.deepcopy(model).train()
        weights = [p for p in trained.parameters() if p.requires_grad]
        if not weights:
            raise ValueError("the model has no trainable parameter, so the check can teach it nothing.")
        optimizer = torch.optim.AdamW(weights, lr=self.learning_rate, weight_decay=0.0)
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(self.seed)
            for step, batch in enumerate(itertools.islice(itertools.cycle(batches), self.steps)):
                optimizer.param_groups[0]["lr"] = self.learning_rate * (1 - step / self.steps)
                where, labels = labelled(batch)
                F.cross_entropy(token_logits(trained, batch).float(), labels[where]).backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return trained


def mean_loss(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> float:
    """Mean loss in nats over all labelled tokens of the batches."""
    total, count = 0.0, 0
    with scoring(model):
        for batch in batches:
            where, labels = labelled(batch)
            loss = F.cross_entropy(token_logits(model, batch).float(), labels[where], reduction="sum")
            total, count = total + float(loss), count + int(where.sum())
    if not count:
        raise ValueError("the batches hold no token with a label.")
    return total / count
