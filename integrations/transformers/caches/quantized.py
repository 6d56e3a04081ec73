"""The quantized cache: all tokens stay, old ones in 2, 4 or 8 bits.

Shape legend: b batch, h query heads, k key-value heads, n tokens seen, t new tokens, d head size.
"""

from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from hf_efficiency.generation.caches.budget import check_tokens
from hf_efficiency.generation.caches.kivi import KiviStore, value_group
from hf_efficiency.generation.caches.slots import ever_attended, for_heads, parents_of, slot_mask
from hf_efficiency.integrations.transformers.caches.attention import Call, can_attend, carry
from hf_efficiency.integrations.transformers.caches.base import EfficientCache, Layer, cropped, filled
from hf_efficiency.kernels.kv_attention import quantized_decode_attention
from transformers import PreTrainedModel

# The kernel gains nothing over more queries; a longer step attends to dequantized keys.
_LONGEST_FUSED = 64


class QuantizedLayer(Layer):
    """A `KiviStore`. Tokens of a recorded step are quantized only once `crop` has accepted them."""

    def __init__(self, bits: int, group_size: int, window: int, fused: bool | None) -> None:
        super().__init__()
        self.bits, self.group_size, self.window, self.fused = bits, group_size, window, fused
        self.store: KiviStore | None = None
        self.due = False  # tokens may wait to be quantized

    def start(self, key_states: Tensor, value_states: Tensor) -> None:
        """No tokens yet."""
        self.store = KiviStore(key_states, value_states, self.bits, self.group_size, self.window)

    def held(self) -> KiviStore:
        """The store."""
        return filled(self.store)

    def rows(self) -> int:
        """The batch size."""
        return len(self.held().groups)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds new tokens (b, k, t, d).

        Returns:
            Keys and values of all tokens, or of those in full precision where a kernel reads the quantized ones.

        Raises:
            ValueError: See `enter`.
        """
        self.enter(key_states, value_states)
        self.settle()
        store, t = self.held(), key_states.shape[2]
        store.append(key_states, value_states)
        first, self.seen, self.due = self.seen == 0, self.seen + t, True
        fused = self.fused if self.fused is not None else key_states.is_cuda
        fused = bool(fused and self.modules and not first and t <= _LONGEST_FUSED and any(store.groups))
        keys, values = store.residual if fused else store.dense()
        return carry(keys, _Step(self, t, first, fused)), values

    def settle(self) -> None:
        """Quantizes what is due."""
        if self.due:
            self.held().flush()
            self.due = False

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the newest tokens back, and quantizes what is due then.

        Raises:
            ValueError: A positive number.
            RuntimeError: Tokens that are quantized already.
        """
        remove = cropped(type(self).__name__, tokens_to_remove)
        if not self.is_initialized:
            return
        store = self.held()
        if remove > min(store.full_precision()):
            raise RuntimeError(
                f"{remove} tokens can't be taken back: all but the newest {min(store.full_precision())} are quantized. "
                "Raise the cache's window, or call activate_past_recording() before the step to be undone."
            )
        store.crop(remove)
        self.seen -= remove
        self.due = True
        self.settle()

    def accept(self, path: list[int], of: int) -> None:
        """Keeps one path of the last step's tree."""
        store = self.held()
        if of > min(store.full_precision()):
            raise RuntimeError(f"There is no recorded draft of {of} tokens to accept a path of.")
        chosen = [x[:, :, x.shape[2] - of :][:, :, path] for x in store.residual]
        store.crop(of)
        store.append(chosen[0], chosen[1])
        self.seen -= of - len(path)
        self.due = True
        self.settle()

    def take(self, rows: Tensor) -> None:
        """Takes the batch's rows in this order."""
        self.settle()
        self.held().select(rows)

    def reset(self) -> None:
        """Forgets everything, and gives the memory back."""
        super().reset()
        self.store, self.due = None, False

    def tensors(self) -> dict[str, Tensor]:
        """Codes, ranges, residual."""
        return self.held().tensors()

    def numbers(self) -> dict[str, Any]:
        """Tokens seen, and of each row its groups and padding."""
        groups, pads = ([], []) if self.store is None else (self.store.groups, self.store.pads)
        return {"seen": self.seen, "groups": groups, "pads": pads}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Takes what was saved."""
        empty = tensors["residual_keys"][:, :, :0], tensors["residual_values"][:, :, :0]
        self.start(*empty)
        store = self.held()
        store.set_tensors(tensors)
        store.groups, store.pads, store.seen = numbers["groups"], numbers["pads"], numbers["seen"]


class _Step:
    """One update of a `QuantizedLayer`, for the attention that follows it."""

    def __init__(self, layer: QuantizedLayer, t: int, first: bool, fused: bool) -> None:
        self.layer, self.t, self.first, self.fused, self.done = layer, t, first, fused, False

    def attend(self, call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Output (b, t, h, d); the first call may quantize what is due (layers may share keys)."""
        layer = self.layer
        if self.done:
            return call(query, *layer.held().dense(), mask)[0] if self.fused else call(query, key, value, mask)[0]
        self.done = True
        if self.first and mask is not None:
            places = torch.arange(self.t, device=key.device).expand(key.shape[0], 1, -1)
            layer.held().pads = (self.t - ever_attended(mask, places)[:, 0].int().sum(1)).tolist()
        if self.fused and not self._crosses():
            output = self._fused(call, query, mask)
        else:
            if self.fused:
                key, value = layer.held().dense()
            if layer.record_past and not self.first and self.t <= _LONGEST_FUSED:
                output = self._draft(call, query, key, value, mask)
            else:
                output = call(query, key, value, mask)[0]
        if not layer.record_past:
            layer.settle()
        return output

    def _crosses(self) -> bool:
        """Whether a group would be quantized between two of the queries."""
        return self.layer.record_past and any(self.layer.held().due(self.layer.seen - 1))

    def _draft(self, call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Each query sees tokens quantized that would be, had the tokens come one by one."""
        store, first = self.layer.held(), self.layer.seen - self.t
        depths, outputs = parents_of(mask, first, self.t)[1], []
        for due, numbers in groupby(range(self.t), lambda i: tuple(store.due(first + depths[i]))):
            queries = list(numbers)
            i, j = queries[0], queries[-1] + 1
            if j - i == self.t and not any(due):
                return call(query, key, value, mask)[0]
            seen = store.flushed(key, value, list(due)) if any(due) else (key, value)
            end = first + j
            part = slot_mask(
                None if mask is None else mask[:, :, i:j],
                torch.arange(end, device=key.device).expand(key.shape[0], key.shape[1], end),
                first + i,
                j - i,
            )
            outputs.append(call(query[:, :, i:j], seen[0][:, :, :end], seen[1][:, :, :end], part)[0])
        return torch.cat(outputs, 1)

    def _fused(self, call: Call, query: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over the codes themselves."""
        layer, store = self.layer, self.layer.held()
        aligned = store.is_aligned() and mask is None
        visible = None
        if not aligned:
            places = store.places().unsqueeze(1).expand(-1, store.residual[0].shape[1], -1)
            visible = for_heads(slot_mask(mask, places, layer.seen - self.t, self.t), query.shape[1])
        output, _ = quantized_decode_attention(
            query, store.keys, store.values, *store.residual, visible, call.scale, is_causal=aligned, with_sums=False
        )
        return output.transpose(1, 2)


class QuantizedKVCache(EfficientCache):
    """All tokens stay, those older than a window in 2, 4 or 8 bits (KIVI, Liu et al. 2024).

    Keys are quantized per channel in groups of tokens, values per token in groups of channels; each token once. Works
    with any attention; padding is left out of the groups, and drafts verified token by token, only where the model can
    attend through the cache ("sdpa" or "eager"). Memory of a layer, a row and head: for each quantized token
    2 d bits / 8 + 4 d / group_size + 4 d / (value group) bytes, for each other one 2 d * bytes of the dtype.

    Args:
        model: The model that will use the cache.
        bits: Of a key's or value's number: 2, 4 or 8.
        group_size: Tokens of a group of keys, and at most so many channels of one of values: 16 to 256, a power of 2.
        window: Newest tokens that stay in full precision; up to group_size - 1 more wait until a group is full.
        fused: Whether a kernel attends to the codes; by default on a GPU.

    Raises:
        ValueError: Bits, groups or a window that the layout doesn't have, or a head size that groups don't fit.
    """

    name = "quantized"

    def __init__(
        self,
        model: PreTrainedModel,
        bits: int = 4,
        group_size: int = 32,
        window: int = 128,
        fused: bool | None = None,
    ) -> None:
        if bits not in (2, 4, 8):
            raise ValueError(f"bits is {bits!r}: choose 2, 4 or 8.")
        if group_size not in (16, 32, 64, 128, 256):
            raise ValueError(f"group_size is {group_size!r}: choose 16, 32, 64, 128 or 256.")
        check_tokens("window", window, 0)
        self.options = {"bits": bits, "group_size": group_size, "window": window, "fused": fused}
        attends = hasattr(model, "set_attn_implementation") and can_attend(model)
        super().__init__(model, lambda i, n: QuantizedLayer(bits, group_size, window, fused), attends=attends)
        for layer in self.layers:
            if isinstance(layer, QuantizedLayer):
                if layer.expected is not None:
                    value_group(layer.expected[1], group_size)
                if not attends:
                    layer.modules = []
