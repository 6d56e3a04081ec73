"""Caches of constant memory: StreamingLLM's sinks and window, and a ring buffer alone.

Shape legend: b batch, h query heads, k key-value heads, n slots and tokens that wait, t new tokens, d head size.
"""

from typing import Any

import torch
from torch import Tensor

from hf_efficiency.generation.caches.attention import query_blocks
from hf_efficiency.generation.caches.budget import check_tokens
from hf_efficiency.generation.caches.rotation import Rotary
from hf_efficiency.generation.caches.slots import attended, ever_attended, narrowed, slot_mask
from hf_efficiency.generation.caches.streaming import Ring, sink_shift, visible
from hf_efficiency.integrations.transformers.caches.attention import Call, carry
from hf_efficiency.integrations.transformers.caches.base import BYPASSED, EfficientCache, Layer, cropped, filled
from hf_efficiency.integrations.transformers.caches.rotary import find_rotary
from transformers import PreTrainedModel


class WindowLayer(Layer):
    """Sinks and a window. Tokens of a recorded step wait beside the ring until `crop` says how many are accepted."""

    def __init__(self, sinks: int, window: int, full_prefill: bool) -> None:
        super().__init__()
        self.sinks, self.window, self.full_prefill = sinks, window, full_prefill
        self.rotary: Rotary | None = None
        self.ring: Ring | None = None
        self.fed: _Fed | None = None

    def start(self, key_states: Tensor, value_states: Tensor) -> None:
        """The whole memory at once."""
        self.ring = Ring(key_states, value_states, self.sinks, self.window)

    def held(self) -> Ring:
        """The ring."""
        return filled(self.ring)

    def rows(self) -> int:
        """The batch size."""
        return self.held().lengths.shape[0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes new tokens (b, k, t, d); their attention must be one of ours, which the keys tell what to do.

        Raises:
            ValueError: See `enter`.
            RuntimeError: The attention of the step before did not come through.
        """
        if self.fed is not None and self.fed.real is None:
            raise RuntimeError(BYPASSED)
        self.enter(key_states, value_states)
        self._settle(0)
        self.fed = _Fed(self, key_states, value_states)
        self.seen += key_states.shape[2]
        return carry(key_states, self.fed), value_states

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens of the last recorded step back.

        Raises:
            ValueError: A positive number.
            RuntimeError: More tokens than that step had.
        """
        remove = cropped(type(self).__name__, tokens_to_remove)
        waiting = self.fed.keys.shape[2] if self.fed is not None else 0
        if remove > waiting and self.is_initialized:
            raise RuntimeError(
                f"{remove} tokens can't be taken back: they are in the ring buffer already. Call "
                f"activate_past_recording() before the step to be undone; {waiting} tokens wait."
            )
        self._settle(remove)

    def settle(self) -> None:
        """Accepts the last step."""
        self._settle(0)

    def _settle(self, remove: int) -> None:
        """Writes the last step into the ring without its last `remove` tokens."""
        fed = self.fed
        if fed is None:
            return
        end = fed.keys.shape[2] - remove
        if end:
            if fed.real is None:
                return  # its attention has not come: it can only be taken back whole
            self.held().write(fed.keys[:, :, :end], fed.values[:, :, :end], fed.start, fed.real[:, :end])
        self.fed = None
        self.seen -= remove

    def accept(self, path: list[int], of: int) -> None:
        """Keeps one path of the last step's tree.

        Raises:
            RuntimeError: The last step was not recorded, or had another number of tokens.
        """
        fed = self.fed
        if fed is None or fed.real is None or fed.keys.shape[2] != of:
            raise RuntimeError(f"There is no recorded draft of {of} tokens to accept a path of.")
        fed.keys, fed.values, fed.real = fed.keys[:, :, path], fed.values[:, :, path], fed.real[:, path]
        self.seen -= of - len(path)
        self._settle(0)

    def take(self, rows: Tensor) -> None:
        """Takes the batch's rows in this order."""
        self._settle(0)
        self.held().select(rows)

    def reset(self) -> None:
        """Forgets everything, and gives the memory back."""
        super().reset()
        self.ring = self.fed = None

    def tensors(self) -> dict[str, Tensor]:
        """The ring, and what waits."""
        waiting = {"waiting_keys": self.fed.keys, "waiting_values": self.fed.values} if self.fed is not None else {}
        return {**self.held().tensors(), **waiting}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Takes what was saved."""
        self.ring = Ring(tensors["keys"], tensors["values"], self.sinks, self.window)
        for name, tensor in tensors.items():
            setattr(self.ring, name, tensor)


class _Fed:
    """Tokens that came with one update: they attend, and go into the ring before or after."""

    def __init__(self, layer: WindowLayer, keys: Tensor, values: Tensor) -> None:
        self.layer, self.keys, self.values, self.start = layer, keys, values, layer.seen
        self.real: Tensor | None = None  # (b, t), once the mask has told

    def attend(self, call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Output (b, t, h, d)."""
        layer, t = self.layer, query.shape[2]
        if call.module not in layer.modules and self.real is None:
            raise ValueError("The cache was made for another model: make a cache for this model.")
        seen = self.start + t
        if mask is not None and mask.shape[-1] != seen:
            raise ValueError(
                f"The attention mask covers {mask.shape[-1]} tokens, and the cache has seen {seen}: a mask covers all "
                "tokens, those that left included."
            )
        places = torch.arange(self.start, seen, device=key.device).expand(key.shape[0], 1, t)
        self.real = torch.ones_like(places[:, 0], dtype=torch.bool)
        if mask is not None:
            self.real = ever_attended(mask, places)[:, 0]
        if t == 1 and not layer.record_past:
            layer._settle(0)
            return self._one(call, query, mask)
        output = self._many(call, query, mask, self.real)
        if not layer.record_past:
            layer._settle(0)
        return output

    def _one(self, call: Call, query: Tensor, mask: Tensor | None) -> Tensor:
        """One query over the ring as it lies, its own token in it. The sinks' keys move in place."""
        layer, ring = self.layer, self.layer.held()
        rank = ring.lengths.unsqueeze(1) - 1
        if layer.sinks and layer.rotary is not None and self.start >= layer.sinks + layer.window:
            ring.keys[:, :, : layer.sinks] = layer.rotary.shift(ring.sinks, sink_shift(rank, layer.sinks, layer.window))
        sees = visible(rank, ring.held_ranks(), layer.sinks, layer.window)
        return call(query, ring.keys, ring.values, _both(sees, mask, ring.positions, self.start))[0]

    def _many(self, call: Call, query: Tensor, mask: Tensor | None, real: Tensor) -> Tensor:
        """Several queries over the ring and the new tokens. Where sinks are at several distances, the queries move."""
        layer, ring, t = self.layer, self.layer.held(), query.shape[2]
        draft = layer.record_past and self.start > 0
        full = layer.full_prefill and not draft
        if full and self.start == 0 and mask is None:
            return call(query, self.keys, self.values, None)[0]
        new = ring.rank(real)
        old_keys = torch.cat((ring.sinks, ring.keys[:, :, layer.sinks :]), 2)
        ranks = torch.cat((ring.held_ranks(), new), 1)
        places = torch.arange(self.start, self.start + t, device=query.device).expand(query.shape[0], t)
        positions = torch.cat((ring.positions, places), 1)
        keys, values = torch.cat((old_keys, self.keys), 2), torch.cat((ring.values, self.values), 2)
        queries = _ranks_of_queries(new, mask, places)
        moves = layer.sinks > 0 and layer.rotary is not None and self.start + t > layer.sinks + layer.window
        if moves and not full:
            query, keys = self._beside(query, keys, ranks, queries)
        window = layer.window if not full else self.start + t
        outputs = []
        for i, j in query_blocks(query, keys):
            sees = visible(queries[:, i:j], ranks, layer.sinks, window)
            part = None if mask is None else mask[:, :, i:j]
            outputs.append(call(query[:, :, i:j], keys, values, _both(sees, part, positions, self.start + i))[0])
        return torch.cat(outputs, 1)

    def _beside(self, query: Tensor, keys: Tensor, ranks: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of twice the size, whose product takes moved queries for the sinks."""
        layer = self.layer
        if layer.rotary is None:
            return query, keys
        moved = layer.rotary.shift(query, -sink_shift(queries, layer.sinks, layer.window))
        is_sink = ((ranks >= 0) & (ranks < layer.sinks)).view(ranks.shape[0], 1, -1, 1)
        halves = keys.masked_fill(is_sink, 0), keys.masked_fill(~is_sink, 0)
        return torch.cat((query, moved), 3), torch.cat(halves, 3)


def _ranks_of_queries(new: Tensor, mask: Tensor | None, places: Tensor) -> Tensor:
    """(b, t) ranks of queries. In a tree a query's rank is the number of tokens that it sees before itself."""
    if mask is None:
        return new
    within = attended(mask)[:, :1, :, int(places[0, 0]) :].sum(3)[:, 0]
    first = new.masked_fill(new < 0, 2**40).amin(1, keepdim=True)
    return torch.where(new >= 0, first + within - 1, -1)


def _both(sees: Tensor, mask: Tensor | None, positions: Tensor, first: int) -> Tensor:
    """What the rule (b, 1, t, n) and the host's mask both show, as a mask of the host's kind."""
    return narrowed(slot_mask(mask, positions.unsqueeze(1), first, sees.shape[2]), sees)


class _WindowCache(EfficientCache):
    def __init__(self, model: PreTrainedModel, sinks: int, window: int, *, full_prefill: bool, positions: str) -> None:
        check_tokens("window", window, 1)
        super().__init__(model, lambda i, n: WindowLayer(sinks, window, full_prefill), attends=True)
        for layer in self.layers:
            if isinstance(layer, WindowLayer) and sinks and positions == "cache":
                layer.rotary = self._rotary(model, layer)

    def _rotary(self, model: PreTrainedModel, layer: WindowLayer) -> Rotary:
        found = next((r for m in layer.modules if (r := find_rotary(model, m, layer.index)) is not None), None)
        if found is None:
            raise ValueError(
                f"{type(model).__name__} has no rotary embedding of a fixed kind, so the sinks' keys can't move with "
                "the text: use positions='absolute'."
            )
        return found


class StreamingCache(_WindowCache):
    """Attention sinks and a window: constant memory and a stable text of any length (StreamingLLM, Xiao et al. 2024).

    Each row's first `sinks` tokens stay, and its newest `window`; padding is not counted. A query sees these and no
    others, inside a prompt too, so chunks, drafts and several calls give the same as one. Memory of a layer:
    rows * heads * ((2 sinks + window) * key size + (sinks + window) * value size) * bytes of the dtype, and 16 bytes a
    slot and row.

    Args:
        model: The model that will use the cache; it must attend with "sdpa" or "eager".
        sinks: First tokens that stay.
        window: Newest tokens that stay.
        positions: "cache" counts positions within the cache (section 3.2), which a model needs for texts longer than
            those it was trained on; "absolute" leaves keys as they came, which any model can.
        full_prefill: Let the tokens of a prompt, or of a chunk of it, see all before them.

    Raises:
        ValueError: Numbers out of range, or positions that the model can't count within the cache.
    """

    name = "streaming"

    def __init__(
        self,
        model: PreTrainedModel,
        sinks: int = 4,
        window: int = 1020,
        positions: str = "cache",
        full_prefill: bool = False,
    ) -> None:
        check_tokens("sinks", sinks, 0)
        if positions not in ("cache", "absolute"):
            raise ValueError(f"positions is {positions!r}: choose 'cache' or 'absolute'.")
        self.options = {"sinks": sinks, "window": window, "positions": positions, "full_prefill": full_prefill}
        super().__init__(model, sinks, window, full_prefill=full_prefill, positions=positions)


class RollingCache(_WindowCache):
    """A ring buffer of the newest `window` tokens, constant memory: the model's attention becomes a sliding window.

    Args:
        model: See `StreamingCache`.
        window: Newest tokens that stay.

    Raises:
        ValueError: A window below 1.
    """

    name = "rolling"

    def __init__(self, model: PreTrainedModel, window: int = 1024) -> None:
        self.options = {"window": window}
        super().__init__(model, 0, window, full_prefill=False, positions="absolute")
