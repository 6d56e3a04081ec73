"""EL2N and GraNd: how wrong a model is about an example early in training.

Paul, Ganguli and Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in Training" (NeurIPS
2021), definitions 2.1 and 2.3. Scores are averaged over several early models; a quantile band leaves out the highest,
which are often mislabelled (section 4.2 of the paper). Shape legend: b examples, m labelled tokens, v vocabulary, d
width of the head's input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_efficiency.selection.signals import example_signal, inputs_of, labelled

if TYPE_CHECKING:
    from collections.abc import Mapping


def el2n(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """‖p − y‖₂ averaged over the tokens of each example, (b,)."""
    return example_signal(model, batch, "el2n")


def grand(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Norm of the gradient of the example's mean loss with respect to the output head's weight, (b,).

    With e_t = p_t − y_t the gradient is Σ_t e_t h_tᵀ / m, so its squared norm is Σ_{t,s} (e_t · e_s)(h_t · h_s) / m²:
    two Gram matrices over the tokens of one example, and no gradient of size v × d.

    Raises:
        ValueError: the model has no output head.
    """
    where, labels = labelled(batch)
    hidden, logits = head_input(model, batch)
    norms = []
    for i, positions in enumerate(where):
        h = hidden[i, : positions.shape[0]][positions].float()
        if not len(h):
            norms.append(torch.tensor(-torch.inf, device=h.device))
            continue
        error = logits[i, : positions.shape[0]][positions].float().softmax(-1)
        error.scatter_add_(1, labels[i][positions][:, None], -torch.ones(len(h), 1, device=h.device))
        norms.append((error @ error.T * (h @ h.T)).sum().clamp(min=0).sqrt() / len(h))
    return torch.stack(norms)


def head_input(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What the output head gets, (b, t, d), and the logits, (b, t, v)."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError("the model has no output head (get_output_embeddings() is None): GraNd needs one.")
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    try:
        logits = model(**inputs_of(batch)).logits
    finally:
        handle.remove()
    return seen[0], logits


def classifier_el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """EL2N of a classifier, (b,), from logits (b, v) and labels (b,)."""
    return (logits.float().softmax(-1) - F.one_hot(labels, logits.shape[-1])).norm(dim=-1)
