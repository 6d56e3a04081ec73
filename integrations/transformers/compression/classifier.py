"""LLMLingua-2: a token classifier that says which tokens to keep, trained on what a teacher kept.

Pan et al. 2024, "LLMLingua-2", sections 3.2 (labels by alignment) and 4 (token classification).

Shape legend: t tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_efficiency.evaluation.metrics import evaluating
from hf_efficiency.generation.compression.alignment import aligned, trustworthy
from hf_efficiency.generation.compression.segments import Span, word_spans
from hf_efficiency.integrations.transformers.compression.scoring import encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Example = tuple[list[int], list[int]]  # ids and labels (1: keep), both (t)


def keep_probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[list[Span], Tensor]:
    """Spans and probabilities (t) that each token stays, read in windows of the model's positions."""
    ids, offsets = encode(tokenizer, text)
    limit = int(getattr(model.config, "max_position_embeddings", None) or 512) - 2
    found = []
    with evaluating(model):
        for start in range(0, len(ids), limit):
            logits = model(torch.tensor([ids[start : start + limit]], device=model.device)).logits[0]
            found.append(logits.float().softmax(-1)[:, 1].cpu())
    return offsets, torch.cat(found) if found else torch.zeros(0)


def labelled(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], max_length: int = 512
) -> list[Example]:
    """Examples from pairs of an original and its compression; pairs that do not match each other are left out.

    Raises:
        ValueError: No pair is left.
    """
    labels = [aligned(_words(original), compressed.split()) for original, compressed in pairs]
    good = trustworthy([(_words(o), c.split(), kept) for (o, c), kept in zip(pairs, labels, strict=True)])
    examples = []
    for index in good:
        original = pairs[index][0]
        ids, offsets = encode(tokenizer, original)
        marks, word, spans = [], 0, word_spans(original)
        for start, _ in offsets:
            while word + 1 < len(spans) and start >= spans[word][1]:
                word += 1
            marks.append(int(labels[index][word]))
        examples += [(ids[i : i + max_length], marks[i : i + max_length]) for i in range(0, len(ids), max_length)]
    if not examples:
        raise ValueError("no pair of an original and its compression is usable: the second must be words of the first")
    return examples


def train_classifier(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    epochs: int = 3,
    learning_rate: float = 1e-4,
    seed: int = 0,
    on_step: Callable[[int, float], Any] | None = None,
) -> list[float]:
    """Trains a token classifier with two labels in place; the mean loss of each epoch.

    Raises:
        ValueError: There are no examples, or the model has not two labels.
    """
    if not examples:
        raise ValueError("there are no examples to train on")
    if model.config.num_labels != 2:
        raise ValueError(f"the classifier has {model.config.num_labels} labels; it must have 2 (drop, keep)")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    mode, losses = model.training, []
    model.train()
    try:
        for _ in range(epochs):
            total = 0.0
            for step, index in enumerate(torch.randperm(len(examples), generator=generator).tolist()):
                ids, labels = (torch.tensor([row], device=model.device) for row in examples[index])
                loss = model(ids, labels=labels).loss
                value = float(loss.detach())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                total += value
                if on_step is not None:
                    on_step(step, value)
            losses.append(total / len(examples))
    finally:
        model.train(mode)
    return losses


def _words(text: str) -> list[str]:
    return [text[start:end].strip() for start, end in word_spans(text)]
