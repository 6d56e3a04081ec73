"""Turns what a user calls calibration data into token ids.

Shape legend: n sequences, t tokens.
"""

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

_TEXT_COLUMNS = ("text", "content", "document")
_SELF_BATCH = 16
SOURCES = ("default", "self")


def check_calibration(calibration: Any, num_samples: int, seq_len: int, batch_size: int) -> None:
    """Checks what can be checked without a model.

    Raises:
        ValueError: For numbers below 1, an unknown name, or empty data.
        TypeError: For data of an unknown kind.
    """
    for name, value in (("num_samples", num_samples), ("seq_len", seq_len), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    if isinstance(calibration, str):
        if calibration not in SOURCES:
            raise ValueError(
                f"calibration={calibration[:40]!r} is unknown: use 'default', 'self', or a list of texts "
                "(one text goes in a list, too)."
            )
    elif calibration is None:
        raise ValueError("calibration=None: this method needs data. Use 'default', 'self', or a list of texts.")
    elif not isinstance(calibration, (Tensor, Sequence)) and not _is_dataset(calibration):
        raise TypeError(
            f"calibration is a {type(calibration).__name__}; give a list of texts, a datasets.Dataset (one split, not "
            "streamed), token ids, 'default' or 'self'."
        )
    elif (calibration.numel() if isinstance(calibration, Tensor) else len(calibration)) == 0:
        raise ValueError("calibration is empty: give at least one text, or use 'default'.")


def _is_dataset(data: Any) -> bool:
    return hasattr(data, "column_names") and isinstance(data, Sized) and not isinstance(data, Mapping)


def needs_tokenizer(calibration: Any) -> bool:
    """Whether the data is text, so that a tokenizer must be at hand."""
    if isinstance(calibration, str):
        return calibration == "default"
    return not isinstance(calibration, Tensor) and not _is_token_lists(calibration)


def resolve_calibration(
    calibration: Any,
    tokenizer: Any = None,
    *,
    num_samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    model: nn.Module | None = None,
) -> Tensor:
    """Token ids (n, t) with n <= num_samples and t = seq_len.

    Args:
        calibration: A list of texts, a `datasets.Dataset` with a text column, token ids (a tensor (n, t) or (t,), or
            lists of ids), `"default"` (the prose of Python's own language reference, `pydoc_data.topics`), or `"self"`
            (text that the model samples itself: LLM-QAT, Liu et al. 2023, section 3.1).
        tokenizer: Tokenizes texts.
        num_samples: How many sequences to draw.
        seq_len: Tokens of a sequence.
        seed: Which sequences are drawn, and the samples of `"self"`.
        model: Needed for `"self"`. Other data is checked against its vocabulary.

    Raises:
        ValueError: If the data is empty, shorter than one sequence, or tokenized for a larger vocabulary.
    """
    check_calibration(calibration, num_samples, seq_len, 1)
    if isinstance(calibration, str) and calibration == "self":
        if model is None:
            raise ValueError("calibration='self' samples text from the model, but no model was given.")
        return sample_from(model, num_samples, seq_len, seed)
    if isinstance(calibration, str):
        calibration = default_texts()
    ids = _token_stream(calibration, tokenizer)
    if model is not None:
        _check_vocabulary(ids, model)
    if isinstance(ids, Tensor) and ids.ndim == 2:
        if ids.shape[1] < seq_len:
            raise ValueError(_too_short(ids.shape[1], seq_len))
        order = _draw(ids.shape[0], num_samples, seed)
        return ids[order, :seq_len].long()
    windows = ids.shape[0] // seq_len
    if not windows:
        raise ValueError(_too_short(ids.shape[0], seq_len))
    return ids[: windows * seq_len].view(windows, seq_len)[_draw(windows, num_samples, seed)].long()


def default_texts() -> list[str]:
    """The topics of Python's language reference, about 0.45 MB of English prose that every machine has."""
    from pydoc_data.topics import topics

    return [topics[key] for key in sorted(topics)]


@torch.no_grad()
def sample_from(model: nn.Module, num_samples: int, seq_len: int, seed: int) -> Tensor:
    """Token ids (num_samples, seq_len) that `model` samples, each from a random first token.

    As in LLM-QAT the first tokens after the start are taken greedily and the rest sampled at temperature 1.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    start = torch.randint(0, vocabulary, (num_samples, 1), generator=generator)
    pieces = []
    for batch in start.split(_SELF_BATCH):
        tokens = batch.to(device)
        cache, step = None, tokens
        for position in range(seq_len - 1):
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits = out.logits[:, -1].float().cpu()
            if position < 3:
                step = logits.argmax(-1, keepdim=True)
            else:
                step = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            step = step.to(device)
            tokens = torch.cat([tokens, step], dim=1)
        pieces.append(tokens.cpu())
    return torch.cat(pieces)


def _check_vocabulary(ids: Tensor, model: Any) -> None:
    size = model.get_input_embeddings().weight.shape[0]
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise ValueError(
            f"The calibration data holds token ids from {low} to {high}, but the model knows 0 to {size - 1}: it was "
            "tokenized by another model's tokenizer. Give texts, or set `tokenizer`."
        )


def _draw(available: int, wanted: int, seed: int) -> Tensor:
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted]


def _too_short(have: int, seq_len: int) -> str:
    return (
        f"The calibration data has {have} tokens, fewer than one sequence of seq_len={seq_len}. "
        "Give more text, or lower seq_len."
    )


def _is_token_lists(data: Any) -> bool:
    if not isinstance(data, Sequence) or isinstance(data, str) or not len(data):
        return False
    first = data[0]
    return (
        isinstance(first, int)
        or (isinstance(first, Sequence) and not isinstance(first, str))
        or isinstance(first, Tensor)
    )


def _token_stream(data: Any, tokenizer: Any) -> Tensor:
    """Token ids as one stream (t,), or (n, t) where the user gave a matrix."""
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.dtype == torch.bool:
            raise TypeError(f"calibration is a tensor of {data.dtype}; token ids must be integers.")
        if data.ndim not in (1, 2):
            raise ValueError(f"calibration is a tensor of shape {tuple(data.shape)}; give token ids (n, t) or (t,).")
        return data
    if _is_token_lists(data):
        if isinstance(data[0], int):
            return torch.tensor(data)
        return torch.cat([torch.as_tensor(row).flatten() for row in data])
    if tokenizer is None:
        raise ValueError(
            "calibration is text, but no tokenizer was found beside the model. Pass `tokenizer=` in the config, or "
            "give token ids."
        )
    texts = _texts(data)
    ids = [i for text in texts if text for i in tokenizer(text, verbose=False)["input_ids"]]
    if not ids:
        raise ValueError("calibration holds only empty texts: give at least one that is not.")
    return torch.tensor(ids)


def _texts(data: Any) -> Iterable[str]:
    if hasattr(data, "column_names"):
        column = next((c for c in _TEXT_COLUMNS if c in data.column_names), None)
        if column is None:
            raise ValueError(
                f"The calibration dataset has the columns {list(data.column_names)}; one of {', '.join(_TEXT_COLUMNS)} "
                "must hold text. Rename it with `dataset.rename_column`."
            )
        data = data[column]
    for text in data:
        if not isinstance(text, str):
            raise TypeError(f"calibration holds a {type(text).__name__} where a text was expected.")
    return data
