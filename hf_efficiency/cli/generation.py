"""From what is typed to the arguments of `generate`, shared by `generate` and `bench-generate`."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_efficiency import SkipLayers, make_cache, speculative
from hf_efficiency.cli.models import load_model, load_tokenizer, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DRAFTING = ("k", "branching", "adapt", "log")


@dataclass(frozen=True)
class Setting:
    """How to generate.

    Attributes:
        draft: As typed; None: plain.
        drafting: Other arguments of `speculative`.
        cache: Its name; None: transformers' own.
        options: Of the cache.
    """

    draft: str | None = None
    drafting: dict[str, Any] = field(default_factory=dict)
    cache: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def read_setting(text: str) -> Setting:
    """A setting from 'NAME=VALUE NAME=VALUE ...'; what belongs to no draft is an option of the cache.

    Raises:
        ValueError: No such pairs, or options without what they are of.
    """
    pairs: dict[str, Any] = {}
    for word in text.split():
        name, sign, value = word.partition("=")
        if not sign or not name or not value:
            raise ValueError(f"--setting {text!r}: {word!r} is not NAME=VALUE")
        pairs[name.replace("-", "_")] = value
    draft, cache = pairs.pop("draft", None), pairs.pop("cache", None)
    drafting = {name: pairs.pop(name) for name in _DRAFTING if name in pairs}
    if "branching" in drafting:
        drafting["branching"] = read_branching(drafting["branching"])
    drafting = {name: _value(value) if isinstance(value, str) and name != "log" else value
                for name, value in drafting.items()}  # fmt: skip
    if draft is None and (drafting or cache is None):
        raise ValueError(f"--setting {text!r} names no draft" + ("" if drafting else " and no cache"))
    if cache is None and pairs:
        raise ValueError(f"--setting {text!r}: {', '.join(pairs)} would be of a cache, and it names none")
    return Setting(draft, drafting, cache, {name: _value(value) for name, value in pairs.items()})


def read_cache(text: str) -> tuple[str, dict[str, Any]]:
    """NAME[,OPTION=VALUE...].

    Raises:
        ValueError: Options that are no pairs.
    """
    name, *options = text.split(",")
    found: dict[str, Any] = {}
    for word in options:
        key, sign, value = word.partition("=")
        if not sign or not key or not value:
            raise ValueError(f"--cache {text!r}: {word!r} is not OPTION=VALUE")
        found[key.replace("-", "_")] = _value(value)
    return name, found


def read_branching(text: str) -> tuple[int, ...]:
    """Numbers with commas between them.

    Raises:
        ValueError: Anything else.
    """
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise ValueError(f"branching {text!r}: give numbers with commas between them, such as 3,2,1") from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


class Drafts:
    """Loads each draft once. A context manager, since drafts from .gguf files lie in folders for a while."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, dtype: str, device: str | None) -> None:
        self.tokenizer, self.dtype, self.device = tokenizer, dtype, device
        self._loaded: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Drafts:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def arguments(self, setting: Setting, model: PreTrainedModel, streamer: Any = None) -> dict[str, Any]:
        """What a setting adds to `generate`, with a new cache.

        Raises:
            ValueError: A draft with another vocabulary, or settings out of range.
        """
        found: dict[str, Any] = {}
        if setting.cache is not None:
            found["past_key_values"] = make_cache(setting.cache, model, **setting.options)
        if setting.draft is not None:
            found["custom_generate"] = speculative(self._draft(setting.draft), streamer=streamer, **setting.drafting)
        elif streamer is not None:
            found["streamer"] = streamer
        return found

    def _draft(self, name: str) -> Any:
        if name in ("lookup", "self"):
            return name
        kind, _, number = name.partition(":")
        if kind == "skip":
            if not number.isdigit():
                raise ValueError(f"the draft {name!r} names no number of blocks: write skip:10, say")
            return SkipLayers(int(number))
        if name not in self._loaded:
            source = self._stack.enter_context(resolve(name))
            if load_tokenizer(source).get_vocab() != self.tokenizer.get_vocab():
                raise ValueError(f"the draft {name!r} has another tokenizer than the model: no token means the same")
            self._loaded[name] = load_model(source.path, self.dtype, self.device)
        return self._loaded[name]


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, *, raw: bool) -> dict[str, Any]:
    """Token ids and mask (1, n), through the chat template where there is one.

    Raises:
        ValueError: The prompt is empty.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    encoded: Any
    if tokenizer.chat_template and not raw:
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills rows up."""
    config: Any = model.generation_config
    found = config.pad_token_id if config.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if found is None else int(found)
