"""A small causal model's numbers for the tokens of a prompt: surprisal, attention, p(question | text).

Shape legend: t tokens, b texts, q queries, h heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_efficiency.generation.compression.segments import Span
from hf_efficiency.generation.compression.token_scores import contrastive, keep_top, surprisal
from transformers import DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHUNK = 256  # tokens of a forward, which bounds the logits held at a time
RESTRICTIVE = "We can get the answer to this question in the given text."  # LongLLMLingua, section 4.1


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[Span]]:
    """Token ids without special tokens, and their spans.

    Raises:
        TypeError: The tokenizer is a slow one, which knows no spans.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} gives no offsets of its tokens: load it with "
            "AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return found["input_ids"], [(start, end) for start, end in found["offset_mapping"]]


class SmallModel:
    """A causal language model in evaluation mode that reads texts.

    Args:
        model: Any causal language model, quantized ones too.
        tokenizer: Its tokenizer, a fast one.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        config = model.config.get_text_config(decoder=True)
        self.limit = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.first = [first if first is not None else 0]
        self.stateful = bool(getattr(model, "_is_stateful", False))

    def surprisal(self, text: str, prefix: str = "") -> tuple[list[Span], Tensor]:
        """Spans and surprisal (t) of the text's tokens, read after `prefix`, in windows where it is too long."""
        ids, offsets = encode(self.tokenizer, text)
        before = self._before(prefix, self.limit // 2)
        values: list[Tensor] = []
        done, context = 0, before
        while done < len(ids):
            room = max(1, self.limit - len(context))
            part = ids[done : done + room]
            values.append(self._window(context, part))
            done += len(part)
            context = [*before, *part[-max(1, (self.limit - len(before)) // 4) :]]
        return offsets, torch.cat(values) if values else torch.zeros(0)

    def contrast(self, text: str, question: str) -> tuple[list[Span], Tensor]:
        """Spans and question-aware scores (t) (LongLLMLingua, equation 4)."""
        offsets, alone = self.surprisal(text)
        _, after = self.surprisal(text, f"{question} {RESTRICTIVE}\n\n")
        return offsets, contrastive(alone, after)

    def iterative(self, text: str, ratio: float, prefix: str = "", segment: int = 200) -> tuple[list[Span], Tensor]:
        """Spans and surprisal (t), each segment read after what is kept of the segments before it.

        LLMLingua, algorithm 2 (iterative token-level prompt compression), with `ratio` of each segment kept.
        """
        ids, offsets = encode(self.tokenizer, text)
        before = self._before(prefix, self.limit // 2)
        if self.stateful or len(before) + len(ids) > self.limit:
            return self.surprisal(text, prefix)
        cache, values = DynamicCache(), []
        last = self._forward(before, cache)[-1:]
        for start in range(0, len(ids), segment):
            part = ids[start : start + segment]
            logits = self._forward(part, cache)
            values.append(surprisal(torch.cat((last, logits[:-1])), self._ids(part)[0]))
            if start + segment < len(ids):
                mask = keep_top(values[-1], ratio)
                if not bool(mask.all()):
                    cache.crop(-len(part))
                    logits = self._forward([i for i, keep in zip(part, mask.tolist(), strict=True) if keep], cache)
                last = logits[-1:]
        return offsets, torch.cat(values) if values else torch.zeros(0)

    def attention(self, text: str, question: str | None = None) -> tuple[list[Span], Tensor]:
        """Spans and the attention (t) that each token gets, a mean over layers, heads and queries.

        The queries are the question's tokens, read after the text; without a question, all later tokens of the text,
        each token's sum divided by the number of queries that could see it.

        Raises:
            ValueError: The model's attention gives no weights, or the text does not fit.
        """
        ids, offsets = encode(self.tokenizer, text)
        asked = encode(self.tokenizer, f"\n\n{question}")[0] if question else []
        if self.stateful or not self.model._can_set_attn_implementation():
            raise ValueError(
                f"{type(self.model).__name__} gives no attention weights: use method='llmlingua' or another small model"
            )
        if 1 + len(ids) + len(asked) > self.limit:
            raise ValueError(
                f"the text has {len(ids)} tokens, but attention is read within the model's {self.limit} positions: use "
                "method='llmlingua', which reads in windows, or compress its documents one by one"
            )
        cache = DynamicCache()
        received = torch.zeros(1 + len(ids) + len(asked))
        queries = [*self.first, *ids]
        if asked:
            self._forward(queries, cache)
            received += self._received(asked, cache)
            return offsets, received[1 : 1 + len(ids)] / len(asked)
        for start in range(0, len(queries), CHUNK):
            part = self._received(queries[start : start + CHUNK], cache)
            received[: len(part)] += part
        seeing = torch.arange(len(queries), 0, -1)
        return offsets, (received / seeing)[1:]

    def likelihood(self, texts: Sequence[str], question: str, batch_size: int = 16) -> list[float]:
        """Mean log-probability of the question's tokens after each text and the restrictive statement."""
        asked = encode(self.tokenizer, f" {question}")[0]
        middle = encode(self.tokenizer, f"\n{RESTRICTIVE}")[0]
        room = max(1, self.limit - len(asked) - len(middle) - 1)
        rows = [[*self.first, *encode(self.tokenizer, text.strip())[0][:room], *middle, *asked] for text in texts]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        result = [0.0] * len(rows)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids, mask = _left_padded([rows[i] for i in batch], self.first[0], self.model.device)
            logits = self.model(
                ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=len(asked) + 1,
                use_cache=False,
            ).logits[:, -len(asked) - 1 : -1]
            for i, row in zip(batch, logits, strict=True):
                result[i] = -float(surprisal(row, self._ids(asked)[0]).mean())
        return result

    def _before(self, prefix: str, limit: int) -> list[int]:
        ids = encode(self.tokenizer, prefix)[0] if prefix else []
        return [*self.first, *ids[-max(1, limit - 1) :]] if ids else [*self.first]

    def _ids(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.device)

    def _window(self, context: list[int], ids: list[int]) -> Tensor:
        """Surprisal (t) of `ids` after `context`."""
        row = [*context, *ids]
        if self.stateful:
            logits = self.model(self._ids(row[:-1]), use_cache=False).logits[0, len(context) - 1 :]
            return surprisal(logits, self._ids(ids)[0]).cpu()
        cache, found = DynamicCache(), []
        for start in range(0, len(row) - 1, CHUNK):
            part = row[start : min(start + CHUNK, len(row) - 1)]
            logits = self._forward(part, cache)
            found.append(surprisal(logits, self._ids(row[start + 1 : start + 1 + len(part)])[0]))
        return torch.cat(found)[len(context) - 1 :].cpu()

    def _forward(self, ids: list[int], cache: Any) -> Tensor:
        """Logits (t, vocabulary) of tokens that follow what the cache holds."""
        return self.model(self._ids(ids), past_key_values=cache, use_cache=True).logits[0]

    def _received(self, ids: list[int], cache: Any) -> Tensor:
        """Attention (cached + t) that these queries give, summed over them, a mean over layers and heads."""
        implementation = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            weights = self.model(
                self._ids(ids), past_key_values=cache, use_cache=True, output_attentions=True, logits_to_keep=1
            ).attentions
        finally:
            self.model.set_attn_implementation(implementation)
        usable = [w[0] for w in weights or () if w is not None]  # (h, q, cached + t)
        if not usable:
            raise ValueError(f"{type(self.model).__name__} gives no attention weights: use method='llmlingua'")
        return torch.stack([w.float().mean(0).sum(0).cpu() for w in usable]).mean(0)


def _left_padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask (b, t)."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
