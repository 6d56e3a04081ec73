"""What all caches share: layers by the model's structure, bytes, saving, and the check that model and cache fit."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_efficiency.integrations.transformers.caches.attention import use_cache_attention
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

Storage = TypeVar("Storage")

# What a layer says at the step after one whose attention never came.
BYPASSED = (
    "The model's attention did not go through the cache: its attention implementation was changed, or the cache was "
    "made for another model. Make the cache after that, for this model. After an interrupt, call the cache's reset()."
)


class Layer(CacheLayerMixin):
    """A cache layer of ours: it can be saved, and its memory be counted."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    index: int
    modules: list[Any]

    def __init__(self) -> None:
        super().__init__()
        self.record_past = False
        self.seen = 0
        self.expected: tuple[int, int] | None = None

    def activate_past_recording(self) -> None:
        """From now on tokens leave only once `crop` has said which of a step are accepted."""
        self.record_past = True

    def get_seq_length(self) -> int:
        """Tokens seen, those that left included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """A mask over all tokens ever seen, whichever are kept."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """Any number of tokens can be fed."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Starts with the first tokens' shapes, dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.start(key_states, value_states)
        self.is_initialized = True

    def enter(self, key_states: Tensor, value_states: Tensor) -> None:
        """Checks what `update` was given, and starts the layer with the first tokens.

        Raises:
            ValueError: Tokens of another model or batch, or with gradients.
        """
        shape = (key_states.shape[1], key_states.shape[3])
        if self.expected is not None and shape != self.expected:
            raise ValueError(
                f"The cache was made for a model with {self.expected[0]} key-value heads of size {self.expected[1]}; "
                f"this one has {shape[0]} of size {shape[1]}: make a cache for this model."
            )
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise ValueError("The cache is for generation: run the model under torch.no_grad().")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif key_states.shape[0] != self.rows():
            raise ValueError(
                f"The cache holds {self.rows()} rows, and {key_states.shape[0]} came: use one cache for each batch, or "
                "batch_repeat_interleave."
            )

    def start(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the empty storage."""
        raise NotImplementedError

    def settle(self) -> None:
        """Accepts the last step, if it is still open."""

    def accept(self, path: list[int], of: int) -> None:
        """Of the last recorded step's `of` tokens, a tree, keeps those of one path, in order."""
        raise NotImplementedError

    def rows(self) -> int:
        """The batch size."""
        raise NotImplementedError

    def take(self, rows: Tensor) -> None:
        """Takes the batch's rows in this order."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        raise NotImplementedError

    def numbers(self) -> dict[str, Any]:
        """What else is to be saved, as JSON knows it."""
        return {"seen": self.seen}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """The inverse of the two above."""
        raise NotImplementedError

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the beams that go on."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Takes the batch's rows `indices` (numbers or a mask)."""
        if self.is_initialized:
            if indices.dtype == torch.bool:
                indices = indices.nonzero().flatten()
            self.take(indices.to(self.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        if self.is_initialized:
            self.take(torch.arange(self.rows(), device=self.device).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forgets everything, and gives the memory back."""
        self.is_initialized, self.seen = False, 0
        self.keys = self.values = None


def filled(storage: Storage | None) -> Storage:
    """The storage itself.

    Raises:
        RuntimeError: There is none yet.
    """
    if storage is None:
        raise RuntimeError("The cache layer holds nothing yet.")
    return storage


def cropped(layer: str, remove: int) -> int:
    """Tokens that `crop(remove)` takes away.

    Raises:
        ValueError: `remove` is positive.
    """
    if remove > 0:
        raise ValueError(f"{layer}.crop({remove}): give the tokens to remove as a negative number, or 0 to accept all.")
    return -remove


class EfficientCache(Cache):
    """A cache made for one model. Layers that already slide, and recurrent ones, keep transformers' own cache layer.

    Attributes:
        options: The arguments it was made with, without the model.
    """

    name: ClassVar[str]
    options: dict[str, Any]

    def __init__(self, model: PreTrainedModel, make: Callable[[int, int], Layer], *, attends: bool) -> None:
        """
        Args:
            model: The model that will use it.
            make: Gives the i-th of n layers that attend to everything.
            attends: Whether attention has to go through the layers.
        """
        if not hasattr(model, "set_attn_implementation") or not hasattr(model, "config"):
            raise TypeError(f"{type(self).__name__} needs the model it is for, and got {type(model).__name__}.")
        config = model.config.get_text_config(decoder=True)
        layers = DynamicCache(config=config).layers
        full = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not full:
            raise ValueError(
                f"{type(model).__name__} has no layer that attends to everything: {type(self).__name__} would change "
                "nothing, so leave it out."
            )
        modules: dict[int, list[Any]] = {}
        if attends:
            use_cache_attention(model)
        for module in model.modules():
            number = getattr(module, "layer_idx", None)
            if isinstance(number, int):
                modules.setdefault(number, []).append(module)
        for count, i in enumerate(full):
            ours = make(count, len(full))
            ours.index, ours.modules = i, modules.get(i, [])
            ours.expected = _head_shape(config.per_layer_config[i])
            layers[i] = ours
        super().__init__(layers=layers)
        self.model_name = f"{config.model_type}, {len(layers)} layers, hidden size {config.hidden_size}"

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Adds a layer's new keys and values, and gives those to attend to.

        Raises:
            ValueError: The cache was made for another model.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"The cache was made for a model with {len(self.layers)} layers, and this one has a layer {layer_idx}: "
                "make a cache for this model."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def accept(self, path: list[int], of: int) -> None:
        """Ends a recorded step whose tokens formed a tree: `crop` for trees.

        The step's 4-D mask must have shown each token its ancestors, and its position_ids must have been depths.

        Args:
            path: Which of the step's tokens stay, each the parent of the next; the same in all rows.
            of: Tokens of the step.

        Raises:
            ValueError: Numbers that aren't ascending, or out of range.
        """
        if any(a >= b for a, b in pairwise([-1, *path, of])):
            raise ValueError(f"The path {path} must ascend within 0 to {of - 1}.")
        for layer in self.layers:
            if isinstance(layer, Layer):
                if layer.is_initialized:
                    layer.accept(path, of)
            elif isinstance(layer, DynamicLayer) and not hasattr(layer, "conv_states"):
                if layer.keys is None:
                    continue
                index = torch.tensor(path, dtype=torch.int64, device=layer.keys.device)
                for name in ("keys", "values"):
                    whole = getattr(layer, name)
                    kept = whole[:, :, whole.shape[2] - of :].index_select(2, index)
                    setattr(layer, name, torch.cat((whole[:, :, : whole.shape[2] - of], kept), 2))
                if hasattr(layer, "cumulative_length"):
                    layer.cumulative_length -= of - len(path)
                layer.crop(0)
            else:
                raise ValueError(f"{type(layer).__name__} holds a recurrent state, which can't follow a tree.")

    def nbytes(self) -> int:
        """Bytes of memory that the cache's tensors hold, measured: whole storages, each counted once."""
        storages = {}
        for layer in self.layers:
            for tensor in _tensors(layer).values():
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def save(self, path: str | Path) -> None:
        """Writes the cache into one safetensors file, from which `load_cache` goes on.

        Raises:
            ValueError: A layer of a kind that can't be saved (recurrent ones).
        """
        tensors, numbers = {}, []
        for i, layer in enumerate(self.layers):
            if isinstance(layer, Layer):
                layer.settle()
            for name, tensor in _tensors(layer).items():
                tensors[f"{i}.{name}"] = tensor.contiguous().clone()
            numbers.append(_numbers(layer))
        about = {"cache": self.name, "options": self.options, "model": self.model_name, "layers": numbers}
        target = Path(path)
        staged = target.with_name(f".{target.name}.new")
        try:
            save_file(tensors, staged, metadata={"hf_efficiency": json.dumps(about)})
            staged.replace(target)
        finally:
            staged.unlink(missing_ok=True)

    def restore(self, path: str | Path, device: torch.device | str) -> None:
        """Takes what `save` wrote.

        Raises:
            ValueError: The file holds a cache of another model or class.
        """
        about = saved_about(path)
        if about["model"] != self.model_name:
            raise ValueError(
                f"{str(path)!r} holds the cache of another model ({about['model']}); this one is {self.model_name}."
            )
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            stored = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        for i, (layer, numbers) in enumerate(zip(self.layers, about["layers"], strict=True)):
            prefix = f"{i}."
            mine = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}
            if not mine:
                continue
            if isinstance(layer, Layer):
                first = next(iter(mine.values()))
                layer.device = first.device
                layer.dtype = getattr(torch, numbers["dtype"])
                layer.restore(mine, numbers)
                layer.seen, layer.is_initialized = numbers["seen"], True
            elif isinstance(layer, DynamicLayer):
                layer.lazy_initialization(mine["keys"], mine["values"])
                layer.keys, layer.values = mine["keys"], mine["values"]
                if "seen" in numbers:
                    setattr(layer, "cumulative_length", numbers["seen"])  # noqa: B010


def saved_about(path: str | Path) -> dict[str, Any]:
    """What a file of a saved cache says of itself.

    Raises:
        ValueError: It is no such file.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no file {str(path)!r}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            about = (file.metadata() or {}).get("hf_efficiency")
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is no safetensors file.") from error
    if about is None:
        raise ValueError(f"{str(path)!r} is a safetensors file, but not of a cache that hf_efficiency saved.")
    found: dict[str, Any] = json.loads(about)
    return found


def _head_shape(config: Any) -> tuple[int, int] | None:
    """Key-value heads and head size that a layer's config tells, if it does."""
    heads, size = getattr(config, "num_key_value_heads", None), getattr(config, "head_dim", None)
    if size is None and heads is not None and hasattr(config, "num_attention_heads"):
        size = config.hidden_size // config.num_attention_heads
    latent = getattr(config, "kv_lora_rank", None)
    return None if heads is None or size is None or latent is not None else (int(heads), int(size))


def _tensors(layer: Any) -> dict[str, Tensor]:
    if isinstance(layer, Layer):
        return layer.tensors() if layer.is_initialized else {}
    if not isinstance(layer, DynamicLayer) or hasattr(layer, "conv_states"):
        raise ValueError(f"{type(layer).__name__} holds a recurrent state, which is not counted or saved here.")
    if layer.keys is None or layer.values is None:
        return {}
    return {"keys": layer.keys, "values": layer.values}


def _numbers(layer: Any) -> dict[str, Any]:
    if isinstance(layer, Layer):
        dtype = str(layer.dtype).removeprefix("torch.") if layer.is_initialized else ""
        return {**layer.numbers(), "dtype": dtype}
    return {"seen": layer.cumulative_length} if hasattr(layer, "cumulative_length") else {}
