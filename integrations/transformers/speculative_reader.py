"""A model that reads tokens ahead and takes back those of other paths, rows of a batch going on at their own pace.

Shape legend: b rows, s slots of the cache, t new tokens, v tokens of the vocabulary.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from hf_efficiency.generation.caches.slots import additive
from hf_efficiency.integrations.transformers.caches.base import EfficientCache, Layer
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import BaseQuantizedLayer, DynamicLayer, DynamicSlidingWindowLayer


class Reader:
    """A model and its cache, of which the last `open` tokens are on trial: a chain, or a tree.

    Attributes:
        length: Slots of the cache that hold tokens that are accepted, or padding.
        open: Slots after them.
        ragged: Whether rows may accept different numbers of tokens. Those that accept fewer are moved to the right, so
            that their padding grows on the left; else all rows must accept the same path.
    """

    def __init__(
        self, model: PreTrainedModel, cache: Cache, mask: Tensor | None, positions: Tensor, extra: dict[str, Any]
    ) -> None:
        """
        Args:
            model: What reads.
            cache: Its cache, as the prompts left it.
            mask: (b, s), 0 for padding; None: there is none.
            positions: (b or 1, 1), or with leading dimensions, of the next token.
            extra: Further arguments of each forward.

        Raises:
            ValueError: A cache from which tokens can't be taken back.
        """
        check_cache(cache)
        self.model, self.cache, self.mask, self.positions, self.extra = model, cache, mask, positions, extra
        self.layers: list[Any] = cache.layers  # of several classes of the host's
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.length, self.open = int(cache.get_seq_length()), 0
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.ragged = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        self._trims = all(type(layer) is DynamicLayer for layer in cache.layers)
        cache.activate_past_recording()

    def feed(self, tokens: Tensor, parents: list[int] | None = None) -> Tensor:
        """Logits (b, t, v) after tokens (b, t).

        Args:
            tokens: They are open until `commit`.
            parents: Of each among the open ones, -1 for the accepted text; None: each follows the one before.
        """
        b, t = tokens.shape
        before = self.open
        self.parents += parents if parents is not None else list(range(before - 1, before + t - 1))
        for parent in self.parents[before:]:
            self.depths.append(self.depths[parent] + 1 if parent >= 0 else 0)
        self.open += t
        arguments = dict(self.extra)
        offsets = torch.tensor(self.depths[before:], device=tokens.device)
        if self.takes_positions:
            arguments["position_ids"] = self.positions + offsets
        is_chain = self.parents == list(range(-1, self.open - 1))
        arguments["attention_mask"] = self._chain_mask(b) if is_chain else self._tree_mask(tokens)
        outputs = self.model(
            input_ids=tokens, past_key_values=self.cache, use_cache=True, return_dict=True, **arguments
        )
        logits: Tensor = outputs.logits
        return logits[:, -t:]

    def _chain_mask(self, b: int) -> Tensor | None:
        return None if self.mask is None else torch.cat((self.mask, self.mask.new_ones(b, self.open)), 1)

    def _tree_mask(self, tokens: Tensor) -> Any:
        """A 4-D mask under which each open token sees its ancestors; one for each kind of layer where they differ."""
        config = self.model.config.get_text_config(decoder=True)
        implementation = str(config._attn_implementation)
        if not implementation.endswith(("sdpa", "eager")) or not self.takes_positions:
            raise ValueError(
                f"{type(self.model).__name__} can't verify a tree "
                + (f"with attention {implementation!r}: use 'sdpa' or 'eager'" if self.takes_positions else "(it takes "
                   "no position_ids)") + ", or leave branching out."
            )  # fmt: skip
        kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None)
        if not kinds:
            return self._tree_mask_of(tokens, window, eager=implementation.endswith("eager"))
        if unknown := kinds - {"full_attention", "sliding_attention"}:
            raise ValueError(f"Layers of {', '.join(sorted(unknown))} can't verify a tree: leave branching out.")
        masks = {
            kind: self._tree_mask_of(
                tokens, window if kind == "sliding_attention" else None, eager=implementation.endswith("eager")
            )
            for kind in kinds
        }
        return masks if "sliding_attention" in masks else masks["full_attention"]

    def _tree_mask_of(self, tokens: Tensor, window: int | None, *, eager: bool) -> Tensor:
        """(b, 1, t, slots seen), boolean, or additive for eager attention."""
        b, t = tokens.shape
        device = tokens.device
        depths = torch.tensor(self.depths, device=device)
        queries = depths[-t:, None]
        text = torch.ones(b, self.length, dtype=torch.bool, device=device) if self.mask is None else self.mask.bool()
        seen = text[:, None].expand(b, t, self.length)
        above = torch.zeros(self.open, self.open, dtype=torch.bool, device=device)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                above[i] = above[parent]
            above[i, i] = True
        above = above[-t:]
        if window is not None:
            distance = self.length - torch.arange(self.length, device=device) + queries
            seen = seen & (distance < window)
            above = above & (queries - depths < window)
        whole = torch.cat((seen, above.expand(b, t, self.open)), 2)
        sliding = [i for i, layer in enumerate(self.cache.layers) if getattr(layer, "is_sliding", False)]
        if window is not None and sliding:
            whole = whole[:, :, -self.cache.get_mask_sizes(t, sliding[0])[0] :]
        whole = whole[:, None]
        return additive(whole, self.model.dtype) if eager else whole

    def commit(self, paths: list[list[int]]) -> None:
        """Accepts one path of the open tokens in each row (their numbers, rising), and takes all others back."""
        if all(path == paths[0] for path in paths):
            self._commit_same(paths[0])
        else:
            self._commit_ragged(paths)
        self.open, self.parents, self.depths = 0, [], []

    def _commit_same(self, path: list[int]) -> None:
        kept = len(path)
        if path == list(range(kept)):
            self.cache.crop(kept - self.open)
        elif isinstance(self.cache, EfficientCache):
            self.cache.accept(path, self.open)
        else:
            start = self.length
            order = [*range(start), *(start + i for i in path), *range(start + kept, start + self.open)]
            self._rearrange(torch.tensor([order], device=self.positions.device))
            self.cache.crop(kept - self.open)
        self.length += kept
        self.positions = self.positions + kept
        if self.mask is not None:
            self.mask = torch.cat((self.mask, self.mask.new_ones(self.mask.shape[0], kept)), 1)

    def _commit_ragged(self, paths: list[list[int]]) -> None:
        most, device = max(len(path) for path in paths), self.positions.device
        mask = self.mask
        if mask is None:
            mask = torch.ones(len(paths), self.length, dtype=torch.long, device=device)
        order, masks = [], []
        for path, row in zip(paths, mask, strict=True):
            shift = most - len(path)
            slots = [*[0] * shift, *range(self.length), *(self.length + i for i in path)]
            order.append([*slots, *[0] * (self.open - most)])
            masks.append(torch.cat((row.new_zeros(shift), row, row.new_ones(len(path)))))
        self._rearrange(torch.tensor(order, device=device))
        self.cache.crop(most - self.open)
        self.mask = torch.stack(masks)
        self.length += most
        self.positions = self.positions + torch.tensor([[len(path)] for path in paths], device=device)
        self._trim()

    def _rearrange(self, order: Tensor) -> None:
        """Takes slots by number (b or 1, s), counted from the first token seen."""
        for layer in self.layers:
            if not isinstance(layer, DynamicLayer) or not layer.is_initialized:
                continue
            if layer.keys is None or layer.values is None:
                continue
            held = layer.keys.shape[2]
            index = (order[:, -held:] - (order.shape[1] - held)).clamp(min=0).to(layer.keys.device)
            if index.shape[0] == 1:
                layer.keys, layer.values = layer.keys[:, :, index[0]], layer.values[:, :, index[0]]
            else:
                row = torch.arange(index.shape[0], device=index.device)[:, None]
                layer.keys = layer.keys.transpose(1, 2)[row, index].transpose(1, 2)
                layer.values = layer.values.transpose(1, 2)[row, index].transpose(1, 2)

    def _trim(self) -> None:
        """Drops slots that are padding in every row."""
        if self.mask is None or not self._trims:
            return
        lead = int((self.mask.cumsum(1) == 0).all(0).sum())
        if lead:
            for layer in self.layers:
                if layer.is_initialized:
                    layer.keys, layer.values = layer.keys[:, :, lead:], layer.values[:, :, lead:]
            self.mask, self.length = self.mask[:, lead:], self.length - lead

    def close(self) -> None:
        """Takes back what is still open, in each layer as far as it got, and lets the cache be used by others."""
        for layer in self.layers:
            over = int(layer.get_seq_length()) - self.length if layer.is_initialized else 0
            if over > 0:
                layer.crop(-over)
            if getattr(layer, "record_past", False):
                layer.record_past = False
        self.open, self.parents, self.depths = 0, [], []


def check_cache(cache: Cache) -> None:
    """ValueError unless tokens can be taken back from each layer."""
    for layer in cache.layers:
        # the host's quantized layers say that they can be cropped, and can't
        croppable = layer.is_croppable and hasattr(layer, "crop") and not isinstance(layer, BaseQuantizedLayer)
        if not (isinstance(layer, Layer) or croppable):
            raise ValueError(
                f"Tokens can't be taken back from the cache's {type(layer).__name__}, as speculative decoding needs: "
                "use a DynamicCache or one of hf_efficiency's caches."
            )
