"""How well a model predicts text, and how far a compressed model has drifted from the original.

Shapes: b batch, w window (tokens), t = w - 1 predicted tokens of a window, V vocabulary, n windows.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_efficiency.evaluation.text import token_windows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Greedy decoding whatever the checkpoint's generation_config says about sampling.
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_k": None, "top_p": None}

# Log-probabilities are taken in float32 for this many logits at a time: 16 MiB a tensor whatever the vocabulary.
_CHUNK_LOGITS = 1 << 22


@dataclass(frozen=True)
class Divergence:
    """What `kl_and_agreement` measures, over the same tokens for both models."""

    mean_kl: float  # nats a token
    top1_agreement: float  # share of tokens, 0 to 1
    perplexity: float
    reference_perplexity: float
    tokens: int  # predicted tokens


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    window: int = 512,
    max_windows: int | None = 48,
    *,
    progress: bool = False,
) -> float:
    """Perplexity of `model` on `text`: exp of the mean negative log-likelihood of a token.

    The text is tokenized once and cut into non-overlapping windows of `window` tokens, of which the first
    `max_windows` (None: all) are read, each on its own: the first token of a window is only read, the other
    `window - 1` are predicted. This is the protocol of the GPTQ paper (arXiv:2210.17323, section 4) at a shorter
    window. Log-probabilities are taken in float32 whatever the model's dtype.

    Raises:
        TypeError: `text` holds something else than strings.
        ValueError: the text is shorter than one window, the window longer than the model reads, or a logit is not
            finite.
    """
    check_window(model.config, window)
    windows = token_windows(tokenizer, text, window, max_windows)
    total = 0.0
    with evaluating(model):
        for index, ids in _numbered(windows, progress):
            logits = next_token_logits(model, ids, index)
            for rows in _row_chunks(logits):
                total += _negative_log_likelihood(logits[rows].float().log_softmax(-1), ids[0, 1:][rows])
    return _exp(total / (windows.numel() - len(windows)))


def kl_and_agreement(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    window: int = 512,
    max_windows: int | None = 48,
    *,
    progress: bool = False,
) -> Divergence:
    """Mean KL(reference || model) over tokens, top-1 agreement, and both perplexities, in one pass over the text.

    Windows as in `perplexity`. Both models read one window at a time, so the logits of two windows are the most that
    is ever held; the divergence is summed in float32 over a few rows at a time, and in float64 across them.

    Raises:
        TypeError: `text` holds something else than strings.
        ValueError: as `perplexity`, and where the two models' vocabularies differ in size.
    """
    check_window(model.config, window)
    check_window(reference.config, window)
    windows = token_windows(tokenizer, text, window, max_windows)
    kl = agree = nll = reference_nll = 0.0
    with evaluating(model, reference):
        for index, ids in _numbered(windows, progress):
            logits = next_token_logits(model, ids, index)
            reference_logits = next_token_logits(reference, ids, index)
            if logits.shape != reference_logits.shape:
                raise ValueError(
                    f"the model has {logits.shape[-1]} logits a token and the reference {reference_logits.shape[-1]}: "
                    "only models with one vocabulary can be compared"
                )
            for rows in _row_chunks(logits):
                target = ids[0, 1:][rows].to(logits.device)
                ours = logits[rows].float().log_softmax(-1)
                theirs = reference_logits[rows].to(logits.device).float().log_softmax(-1)
                kl += F.kl_div(ours, theirs, reduction="sum", log_target=True).item()
                agree += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
                nll += _negative_log_likelihood(ours, target)
                reference_nll += _negative_log_likelihood(theirs, target)
    tokens = windows.numel() - len(windows)
    return Divergence(
        mean_kl=kl / tokens,
        top1_agreement=agree / tokens,
        perplexity=_exp(nll / tokens),
        reference_perplexity=_exp(reference_nll / tokens),
        tokens=tokens,
    )


def next_token_logits(model: PreTrainedModel, ids: Tensor, index: int = 0) -> Tensor:
    """Logits (w - 1, V) of the tokens 1 to w - 1 of `ids` (1, w), in the model's dtype; `index` names the window.

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits[0, :-1]
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"the logits of {type(model).__name__} on window {index} are not finite (NaN or infinite): its weights are "
            f"broken, or {logits.dtype} overflows; check the weights, or load it in float32 or bfloat16"
        )
    return logits


def _negative_log_likelihood(log_probabilities: Tensor, target: Tensor) -> float:
    """Sum over tokens of -log p(target); log_probabilities (t, V), target (t,)."""
    return F.nll_loss(log_probabilities, target.to(log_probabilities.device), reduction="sum").item()


def _exp(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:  # finite logits of a destroyed model
        return math.inf


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK_LOGITS // logits.shape[-1])
    return (slice(start, start + step) for start in range(0, len(logits), step))


def _numbered(windows: Tensor, progress: bool) -> Iterator[tuple[int, Tensor]]:
    yield from enumerate(tqdm(windows.split(1), desc="evaluating", unit="window", disable=not progress))


@contextlib.contextmanager
def evaluating(*models: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; each model's own mode comes back afterwards."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        # not inference_mode: a layer may build a packed copy of its weights here that training reads later
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def check_window(config: PretrainedConfig, window: int) -> None:
    """Make sure that a model with `config` can read `window` tokens.

    Raises:
        ValueError: it cannot.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < window:
        raise ValueError(f"window is {window} tokens, but the model reads at most {limit}: use a smaller one")
