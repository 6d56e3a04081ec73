"""Drafts by models: a smaller one, or some of the target's own blocks.

Shape legend: b rows, n drafted tokens, v tokens of the vocabulary.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficiency.distillation.student import cut_depth
from hf_efficiency.distillation.trace import decoder_blocks
from hf_efficiency.generation.speculative import Draft, Scorer, TreeShape
from hf_efficiency.integrations.transformers.speculative_reader import Reader
from transformers import DynamicCache, PreTrainedModel


class ModelDrafter:
    """A causal language model that drafts, dense or quantized, with a cache of its own.

    Greedy drafts are its best tokens; for sampling each is drawn from its distribution as the target's logits
    processors make it, the children of one node without replacement.

    Args:
        model: With the target's vocabulary.

    Raises:
        TypeError: It is no causal language model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
            raise TypeError(f"The draft must be a causal language model, and is a {type(model).__name__}.")
        self.model = model
        self._reader: Reader | None = None

    def _cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def check(self, target: PreTrainedModel) -> None:
        """ValueError unless the vocabulary is the target's."""
        ours, theirs = (m.config.get_text_config(decoder=True).vocab_size for m in (self.model, target))
        if ours != theirs:
            raise ValueError(
                f"The draft's vocabulary has {ours} tokens and the target's {theirs}: a draft needs the target's own "
                "tokenizer. Use a smaller model of the same family, make_student(target), or draft='lookup'."
            )

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Notes the prompts; they are read when the first draft is wanted."""
        mask = None if attention_mask is None or bool((attention_mask != 0).all()) else attention_mask
        self._prompt, self._mask, self._reader = input_ids, mask, None
        self._read = [input_ids.shape[1] - 1] * input_ids.shape[0]
        self._open: list[list[int]] = []  # of each row, the open tokens

    @torch.no_grad()
    def propose(self, rows: Sequence[Sequence[int]], branching: tuple[int, ...], scorer: Scorer) -> Draft:
        """A chain, or a tree."""
        logits = self._catch_up(rows)
        tree, b = TreeShape(branching), len(rows)
        tokens: list[Tensor] = []  # of each node, (b,)
        probs: list[Tensor] = []  # of each node with children, (b, v), the text's first
        level_logits, above, last = logits[:, None], [-1], len(branching) - 1
        texts = [torch.tensor(row, device=scorer.device) for row in rows]
        for depth, width in enumerate(branching):
            for i, node in enumerate(above):
                prefixes = self._prefixes(texts, tokens, tree.parents, node)
                scores = scorer.scores(range(b), prefixes, level_logits[:, i])
                chosen, drawn = _choose(scores, width, greedy=scorer.greedy)
                tokens += list(chosen.unbind(1))
                if drawn is not None:
                    probs.append(drawn)
            above = list(tree.levels[depth])
            if depth < last:
                level = torch.stack([tokens[node] for node in above], 1)
                level_logits = self._held().feed(level.clamp(min=0), [tree.parents[node] for node in above])
                for row, new in zip(self._open, level.tolist(), strict=True):
                    row += new
        chain = max(branching) == 1
        return Draft(torch.stack(tokens, 1), None if chain else tree.parents, torch.stack(probs, 1) if probs else None)

    def _held(self) -> Reader:
        if self._reader is None:
            raise RuntimeError("The drafter has no text yet: call begin first.")
        return self._reader

    def _prefixes(self, rows: list[Tensor], tokens: list[Tensor], parents: list[int], node: int) -> list[Tensor]:
        path: list[Tensor] = []
        while node >= 0:
            path.insert(0, tokens[node])
            node = parents[node]
        if not path:
            return rows
        added = torch.stack(path, 1)
        return [torch.cat((row, more)) for row, more in zip(rows, added, strict=True)]

    def _catch_up(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Accepts what of the last draft stands in the rows, reads the rest, and gives the logits (b, v) after it."""
        if self._reader is None:
            self._start()
        reader = self._held()
        paths = [self._path(row, read, opened) for row, read, opened in zip(rows, self._read, self._open, strict=True)]
        # at least one token is read anew, for the logits after it
        paths = [path[: max(0, len(row) - read - 1)] for row, read, path in zip(rows, self._read, paths, strict=True)]
        reader.commit(paths)
        behind = [list(row[read + len(path) :]) for row, read, path in zip(rows, self._read, paths, strict=True)]
        most = max(1, *(len(row) for row in behind))
        tokens = torch.tensor([[*row, *[0] * (most - len(row))] for row in behind], device=self._prompt.device)
        logits = reader.feed(tokens)
        reader.commit([list(range(len(row))) for row in behind])
        self._read, self._open = [len(row) for row in rows], [[] for _ in rows]
        last = torch.tensor([max(0, len(row) - 1) for row in behind], device=logits.device)
        return logits[torch.arange(len(behind), device=logits.device), last]

    def _start(self) -> None:
        """Reads the prompts but for their last token."""
        ids, mask, cache = self._prompt, self._mask, self._cache()
        b, n = ids.shape
        before = None if mask is None else mask[:, : n - 1]
        lengths = torch.full((b,), n - 1, device=ids.device) if before is None else before.sum(1)
        if n > 1:
            positions = torch.arange(n - 1, device=ids.device).expand(b, n - 1)
            if before is not None:
                positions = (before.long().cumsum(1) - 1).clamp(min=0)
            arguments: dict[str, Any] = {"position_ids": positions, "attention_mask": before}
            model: Any = self.model
            if model._supports_logits_to_keep():
                arguments["logits_to_keep"] = 1
            accepted = _accepted_arguments(self.model, arguments)
            self.model(input_ids=ids[:, : n - 1], past_key_values=cache, use_cache=True, **accepted)
        self._reader = Reader(self.model, cache, before, lengths[:, None], {})
        self._open = [[] for _ in range(b)]

    def _path(self, row: Sequence[int], read: int, opened: list[int]) -> list[int]:
        """Which open tokens the row took, in order."""
        parents, path, at = self._held().parents, [], -1
        for token in row[read:]:
            child = next((i for i in range(at + 1, len(opened)) if parents[i] == at and opened[i] == token), None)
            if child is None:
                break
            path.append(child)
            at = child
        return path


class SkipLayers:
    """Drafts with some of the target's own blocks, without more memory for weights (Zhang et al. 2024, Draft & Verify).

    Without training few drafts are accepted: the loop then stops drafting.

    Args:
        keep: The blocks that draft, from 0 on in rising order; the first must be among them. A number keeps so many,
            spread evenly.
    """

    def __init__(self, keep: int | Sequence[int]) -> None:
        self.keep = keep

    def drafter(self, target: PreTrainedModel) -> ModelDrafter:
        """The drafter for a target.

        Raises:
            ValueError: Blocks that the target doesn't have.
        """
        return _SkippingDrafter(shallow(target, self.keep))


class _SkippingDrafter(ModelDrafter):
    def _cache(self) -> DynamicCache:
        return DynamicCache()  # by number of the whole model's blocks, those left out staying empty


def shallow(model: PreTrainedModel, keep: int | Sequence[int]) -> PreTrainedModel:
    """A view of some of a model's blocks that shares all its weights.

    Raises:
        ValueError: Blocks that the model doesn't have, or not the first.
    """
    blocks = decoder_blocks(model)
    total = len(blocks)
    if isinstance(keep, int):
        kept = [i * total // keep for i in range(keep)] if 1 <= keep <= total else []
    else:
        kept = list(keep)
    if not kept or kept != sorted(set(kept)) or kept[0] != 0 or kept[-1] >= total:
        raise ValueError(f"keep={keep!r} must name blocks from 0 to {total - 1} in rising order, 0 among them.")
    path = next(name for name, module in model.named_modules() if module is blocks).split(".")
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    cut_depth(text, kept, total)
    top = _copied(model, config)
    inner: Any = top
    for name in path[:-1]:
        inner._modules[name] = _copied(inner._modules[name], text)
        inner = inner._modules[name]
    inner._modules[path[-1]] = nn.ModuleList([blocks[i] for i in kept])
    return top


def _copied(module: Any, config: Any) -> Any:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    if hasattr(module, "config"):
        twin.config = config
    return twin


def _choose(scores: Tensor, width: int, *, greedy: bool) -> tuple[Tensor, Tensor | None]:
    """Tokens (b, width) from scores (b, v), and the distribution they were drawn from."""
    if greedy:
        return (scores.argmax(-1, keepdim=True) if width == 1 else scores.topk(width, -1).indices), None
    probs = torch.softmax(scores, -1)
    if width == 1:
        return torch.multinomial(probs, 1), probs
    # fewer tokens than children may have a chance; what is drawn beyond them is no node
    drawn = torch.multinomial(probs + torch.finfo(probs.dtype).tiny, width)
    return torch.where(probs.gather(1, drawn) > 0, drawn, -1), probs


def _accepted_arguments(model: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in arguments.items() if name in known}
