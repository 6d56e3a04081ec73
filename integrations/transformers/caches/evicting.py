"""Cache layers from which tokens leave, by a policy of `hf_efficiency.generation.caches`, head by head.

Shape legend: b batch, h query heads, k key-value heads, n slots, t new tokens, d head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_efficiency.generation.caches.attention import attention_with_sums, query_blocks
from hf_efficiency.generation.caches.budget import Budget, tokens_of
from hf_efficiency.generation.caches.policies import Policy, choose, with_recent
from hf_efficiency.generation.caches.slots import (
    Slots,
    attended,
    ever_attended,
    for_heads,
    narrowed,
    parents_of,
    slot_mask,
)
from hf_efficiency.integrations.transformers.caches.attention import Call, carry
from hf_efficiency.integrations.transformers.caches.base import BYPASSED, Layer, cropped, filled

# A recorded step of more tokens is a prompt. Shorter ones are drafts, whose tokens must see what each would see alone.
_LONGEST_DRAFT = 64


class EvictingLayer(Layer):
    """Keeps the tokens that a policy chooses, within a budget.

    After a prompt (or a chunk of one, which attends to everything before it is judged) tokens leave at once. While
    single tokens are decoded, one leaves for each that comes. A draft that is verified in one forward is taken token by
    token, so that each of its tokens sees what it would see alone; `crop` then keeps the accepted ones.
    """

    def __init__(self, policy: Policy, budget: Budget) -> None:
        super().__init__()
        self.policy, self.budget = policy, budget
        self._forget()

    def _forget(self) -> None:
        self.slots: Slots | None = None
        self.capacities: list[int] = []
        self.free = 0  # slots that are empty in every head
        self.evicted = False
        self.waiting = 0  # tokens of an update whose attention is not through
        self.last = 0  # tokens of the step that `crop` may shorten; 0 when it is settled
        # Of a recorded draft: the tokens kept and their scores before it and after each of its tokens.
        self.history: list[tuple[Tensor, Tensor]] = []
        self.places: Tensor | None = None  # of a recorded draft: positions, where a tree's tokens have those of depths

    def start(self, key_states: Tensor, value_states: Tensor) -> None:
        """No slots yet."""
        self.slots = Slots(key_states, value_states)

    def rows(self) -> int:
        """The batch size."""
        return self._held().lengths.shape[0]

    def _held(self) -> Slots:
        return filled(self.slots)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds new tokens (b, k, t, d).

        Returns:
            Keys and values of all slots. Their attention must be one of ours, which the keys tell what to do.

        Raises:
            ValueError: See `enter`.
            RuntimeError: The attention of the step before did not come through.
        """
        if self.waiting:
            raise RuntimeError(BYPASSED)
        self.enter(key_states, value_states)
        self._settle(0)
        slots, t = self._held(), key_states.shape[2]
        prompt = self.seen == 0 or t > _LONGEST_DRAFT or (t > 1 and not self.record_past)
        if prompt and self.free:
            slots.compact(slots.size)
        new = slots.insert(key_states, value_states, self.seen, 0 if prompt else self.free)
        self.seen += t
        self.waiting = t
        return carry(slots.keys, _Step(self, new, prompt)), slots.values

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens of the last step back, and lets tokens leave that had to wait for it.

        Raises:
            ValueError: A positive number.
            RuntimeError: More tokens than the last step had, after others have left to make room for them.
        """
        remove = cropped(type(self).__name__, tokens_to_remove)
        if not self.is_initialized:
            return
        if remove and remove == self.waiting:
            self._take_back()
            return
        if remove > self.last and self.evicted:
            raise RuntimeError(
                f"{remove} tokens can't be taken back: others left the cache to make room for them. Call "
                f"activate_past_recording() before the step to be undone; it had {self.last} tokens."
            )
        if remove > self.seen:
            raise ValueError(f"{remove} tokens can't be taken back of {self.seen}.")
        self._settle(remove)

    def _take_back(self) -> None:
        """Undoes an update whose attention broke off: nothing has been judged by it yet."""
        slots = self._held()
        self.seen -= self.waiting
        slots.keep(slots.positions < self.seen)
        self.free = max(self.free, self.waiting)
        self.waiting, self.history = 0, []

    def settle(self) -> None:
        """Accepts the last step."""
        self._settle(0)

    def _settle(self, remove: int) -> None:
        """Ends the last step without its last `remove` tokens."""
        if remove == 0 and self.last == 0:
            return
        slots, last = self._held(), self.last
        self.seen -= remove
        slots.lengths -= remove
        if self.history and remove <= last:
            kept, slots.scores = self.history[last - remove]
            slots.keep(kept)
            self._make_room()
        else:
            slots.keep(slots.positions < self.seen)
            if last:
                self._leave_after_prompt()
        self.history, self.last = [], 0

    def accept(self, path: list[int], of: int) -> None:
        """Keeps one path of the last step's tree.

        Raises:
            RuntimeError: The last step was no recorded draft of so many tokens.
        """
        if not self.history or self.places is None or self.last != of:
            raise RuntimeError(f"There is no recorded draft of {of} tokens to accept a path of.")
        slots = self._held()
        kept, slots.scores = self.history[path[-1] + 1 if path else 0]
        slots.positions = self.places
        slots.keep(kept)
        self.seen -= of - len(path)
        slots.lengths -= of - len(path)
        self._make_room()
        self.history, self.last, self.places = [], 0, None

    def _leave_after_prompt(self) -> None:
        """Lets tokens leave until the budget holds, and gives their memory back."""
        slots = self._held()
        alive = slots.alive
        self.capacities = tokens_of(self.budget, slots.lengths.tolist())
        kept = choose(
            self._priorities(slots.scores, self.seen - 1, slots.positions), alive, self._tensor(self.capacities)
        )
        self.evicted = self.evicted or bool((alive & ~kept).any())
        slots.keep(kept)
        size = int(kept.sum(2).max())
        if size < slots.size:
            slots.compact(size)
        self.free = 0

    def _make_room(self) -> None:
        """Counts the slots that are free in every head, and gives back what a draft needed and one token doesn't."""
        slots = self._held()
        if not self.policy.evicts_while_decoding:
            self.free = 0
            return
        most = max(self.capacities)
        self.free = max(0, slots.size - most)
        if self.free > (_LONGEST_DRAFT if self.record_past else 1):
            slots.compact(most)
            self.free = 0

    def _priorities(self, scores: Tensor, newest: int, places: Tensor) -> Tensor:
        recent = self._tensor(self.policy.recent_tokens(self.capacities))
        return with_recent(scores, places, newest, recent)

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.device)

    def take(self, rows: Tensor) -> None:
        """Takes the batch's rows in this order."""
        self._settle(0)
        self._held().select(rows)
        if self.capacities:
            self.capacities = [self.capacities[row] for row in rows.tolist()]

    def reset(self) -> None:
        """Forgets everything, and gives the memory back."""
        super().reset()
        self._forget()

    def tensors(self) -> dict[str, Tensor]:
        """Keys, values, positions, scores, lengths."""
        return self._held().tensors()

    def numbers(self) -> dict[str, Any]:
        """Tokens seen and the rows' budgets."""
        return {"seen": self.seen, "capacities": self.capacities, "evicted": self.evicted, "free": self.free}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Takes what was saved."""
        self.slots = Slots(tensors["keys"], tensors["values"])
        for name, tensor in tensors.items():
            setattr(self.slots, name, tensor)
        self.capacities, self.evicted, self.free = numbers["capacities"], numbers["evicted"], numbers["free"]


class _Step:
    """One update of an `EvictingLayer`, for the attention that follows it."""

    def __init__(self, layer: EvictingLayer, new: Tensor, prompt: bool) -> None:
        self.layer, self.new, self.prompt = layer, new, prompt
        self.positions = layer._held().positions
        self.done = False

    def attend(self, call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Output (b, t, h, d); the first call also judges the tokens (layers may share keys)."""
        layer, t = self.layer, query.shape[2]
        if call.module not in layer.modules and not self.done:
            raise ValueError("The cache was made for another model: make a cache for this model.")
        if mask is not None and mask.shape[-1] != layer.seen:
            raise ValueError(
                f"The attention mask covers {mask.shape[-1]} tokens, and the cache has seen {layer.seen}: a mask "
                "covers all tokens, those that left included."
            )
        first = layer.seen - t
        if self.done:
            return call(query, key, value, slot_mask(mask, self.positions, first, t))[0]
        self.done = True
        if self.prompt:
            real = self._arrive(mask)
            output = self._prompt(call, query, key, value, mask)
        else:
            parents, depths = parents_of(mask, first, t)
            real = self._arrive(mask, depths)
            output = self._decode(call, query, key, value, mask, parents, depths)
        layer._held().lengths += real
        layer.waiting, layer.last = 0, t
        if not layer.record_past:
            layer._settle(0)
        return output

    def _arrive(self, mask: Tensor | None, depths: Sequence[int] = ()) -> Tensor:
        """Drops tokens that no query sees (padding), and gives the new ones their first scores.

        Args:
            mask: Of the step.
            depths: Of a draft's tokens.

        Returns:
            How many of them are real (b,).
        """
        layer, slots = self.layer, self.layer._held()
        b, k, t = self.new.shape
        if mask is None:
            real = torch.ones(b, t, dtype=torch.int64, device=self.new.device)
        else:
            seen = ever_attended(mask, self.positions)
            slots.keep(seen)
            real = seen.gather(2, self.new)[:, 0].long()
        before = real.cumsum(1) - 1
        if len(depths) > 1:
            before = torch.tensor(depths, device=real.device).expand(b, t)
        ranks = slots.lengths.unsqueeze(1) + before
        slots.scores.scatter_(2, self.new, layer.policy.begin(ranks, (b, k, t), layer.index))
        return real.sum(1)

    def _prompt(self, call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of all queries, of which the policy sees the last ones'."""
        layer, slots, t = self.layer, self.layer._held(), query.shape[2]
        scored = layer.policy.scored_queries(t, prompt=True)
        outputs, sums, start = [], torch.zeros_like(slots.scores), t - scored
        if start and mask is None and key.shape[2] == t and not call.eager:
            outputs.append(call(query[:, :, :start], key[:, :, :start], value[:, :, :start], None)[0])
            blocks = query_blocks(query, key, start)
        else:
            blocks = query_blocks(query, key, 0, start) + query_blocks(query, key, start)
        for i, j in blocks:
            part = None if mask is None else mask[:, :, i:j]
            visible = slot_mask(part, self.positions, layer.seen - t + i, j - i)
            output, added = self._weigh(call, query[:, :, i:j], key, value, visible, scored=i >= start)
            outputs.append(output)
            if added is not None:
                sums += added
        if scored:
            slots.scores = layer.policy.observe(slots.scores, sums, slots.positions, layer.seen - 1, True)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _weigh(
        self, call: Call, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, *, scored: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Output, and with `scored` the attention of each key summed over the queries and its group's heads."""
        if scored and not call.eager:
            return attention_with_sums(query, key, value, visible, call.scale)
        output, weights = call(query, key, value, visible)
        if not scored:
            return output, None
        if weights is None:
            raise ValueError(
                "The model's eager attention returns no weights: call model.set_attn_implementation('sdpa') before "
                "making the cache."
            )
        b, h, t, n = weights.shape
        heads = key.shape[1]
        # A padding query, which sees nothing, gives equal weights to everything.
        sees = for_heads(attended(visible).any(3, keepdim=True), h)
        weights = weights * sees
        return output, weights.float().reshape(b, heads, h // heads, t, n).sum((2, 3))

    def _decode(
        self,
        call: Call,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        parents: list[int],
        depths: list[int],
    ) -> Tensor:
        """One query after the other, each seeing what its parent left: in a chain, the query before it."""
        layer, policy, slots, t = self.layer, self.layer.policy, self.layer._held(), query.shape[2]
        first = layer.seen - t
        visible = slot_mask(mask, self.positions, first, t)
        places = slots.positions
        if any(depth != i for i, depth in enumerate(depths)):
            moved = torch.tensor(depths, dtype=torch.int32, device=places.device) + first
            places = torch.where(places < first, places, moved[(places - first).clamp(min=0).long()])
        layer.places = places
        old = slots.alive & (slots.positions < first)
        scored = policy.scored_queries(1, prompt=False)
        history = [(old, slots.scores)]
        together = not scored and not policy.evicts_while_decoding
        capacity, outputs = layer._tensor(layer.capacities), []
        for i, parent in enumerate(parents):
            before, scores = history[parent + 1]
            alive = before | (slots.alive & (slots.positions == first + i))
            if not together:
                one, sees = query[:, :, i : i + 1], _hide(visible[:, :, i : i + 1], alive)
                output, sums = self._weigh(call, one, key, value, sees, scored=scored > 0)
                outputs.append(output)
                newest = first + depths[i]
                if sums is not None:
                    scores = policy.observe(scores, sums, places, newest, False)
                alive = choose(layer._priorities(scores, newest, places), alive, capacity, excess=1)
            history.append((alive, scores))
        layer.history = history
        if together:
            return call(query, key, value, _hide(visible, slots.alive))[0]
        # Whether a token left is not asked of the device: from now on it may have.
        layer.evicted = layer.evicted or slots.size > max(layer.capacities)
        return outputs[0] if t == 1 else torch.cat(outputs, 1)


def _hide(visible: Tensor, alive: Tensor) -> Tensor:
    """A mask (b, k or h, t, n) without the slots that are not alive (b, k, n)."""
    return narrowed(visible, for_heads(alive.unsqueeze(2), visible.shape[1]))
