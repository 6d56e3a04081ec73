"""The decoding loop of speculative decoding: draft, verify in one forward, write, settle the cache.

Shape legend: b rows, n drafted tokens, v tokens of the vocabulary.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_efficiency.generation.speculative import Draft, DraftControl, Scorer, SpeculativeStatistics, verify
from hf_efficiency.integrations.transformers.speculative_reader import Reader
from hf_efficiency.integrations.transformers.speculative_text import Rows, Scores, Stops
from transformers import PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

_NOT_FORWARDED = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache"}
_NOT_FORWARDED |= {"logits_to_keep", "token_type_ids", "mm_token_type_ids"}


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What `generate(return_dict_in_generate=True)` returns, with `statistics` of this call."""

    statistics: SpeculativeStatistics | None = None


class Run:
    """One call of `generate`."""

    def __init__(
        self,
        drafter: Any,
        owner: Any,
        model: PreTrainedModel,
        input_ids: Tensor,
        processors: Any,
        criteria: Any,
        config: Any,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.drafter, self.owner, self.model, self.config, self.kwargs = drafter, owner, model, config, model_kwargs
        self.free = bool(getattr(self.drafter, "free", False))
        self.input_ids = input_ids
        self.rows = Rows(input_ids)
        self.b = input_ids.shape[0]
        self.active = [True] * self.b
        self.scores = Scores(processors, self.b)
        self.plain = not len(processors)
        self.stops = Stops(criteria)
        self.limit = criteria.max_length if criteria.max_length is not None else 2**31
        self.control = DraftControl(owner.branching, owner.adapt)
        self.statistics = SpeculativeStatistics()
        self.greedy = not config.do_sample
        self.refused: list[list[int]] = [[] for _ in range(self.b)]
        wanted = config.return_dict_in_generate
        self.kept_scores = self._places() if wanted and config.output_scores else None
        self.kept_logits = self._places() if wanted and config.output_logits else None
        self.clock = _clock(model.device)

    def _places(self) -> list[list[Tensor]]:
        return [[] for _ in range(self.b)]

    def generate(self) -> Any:
        """Writes until all rows have ended."""
        if self.owner.streamer is not None:
            self.owner.streamer.put(self.input_ids.cpu())
        began = self.clock()
        with torch.no_grad():
            model: Any = self.model
            outputs = model._prefill(self.input_ids, self.config, self.kwargs)
            logits = outputs.logits[:, -1:]
            self._open_reader(outputs.past_key_values, logits)
            del outputs
            self.statistics.prefill_seconds = self.clock() - began
            try:
                mask = self.kwargs.get("attention_mask")
                if self.input_ids.shape[1]:
                    self.drafter.begin(self.input_ids, _mask_of(mask, self.input_ids))
                self._take(Draft(self.input_ids.new_empty(self.b, 0)), logits, slots=0)
                while any(self.active):
                    self._step()
            finally:
                self.reader.close()
        if self.owner.streamer is not None:
            self.owner.streamer.end()
        if self.owner.log is not None:
            self._write_log(self.owner.log)
        return self._result()

    def _open_reader(self, cache: Any, logits: Tensor) -> None:
        mask, positions = self.kwargs.get("attention_mask"), self.kwargs.get("position_ids")
        if cache is None:
            raise ValueError(f"{type(self.model).__name__} gives no cache, which speculative decoding needs.")
        length = cache.get_seq_length()
        if positions is None:
            last = torch.full((1, 1), length, device=logits.device)
        else:
            last = positions[..., -1:].to(logits.device) + 1
        extra = {name: value for name, value in self.kwargs.items() if name not in _NOT_FORWARDED and _is_plain(value)}
        mask = None if mask is None else mask[:, :length].to(logits.device)
        self.reader = Reader(self.model, cache, mask, last, extra)
        # a cache that outlives the call must hold what plain generation would leave there
        outlives = self.config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
        self.ragged = self.reader.ragged and not outlives
        if self.b > 1 and not self.ragged and max(self.owner.branching) > 1:
            self.reader.close()
            raise ValueError(
                f"Rows of a batch take different branches of a tree, and a cache that is given or returned, here "
                f"{type(cache).__name__}, keeps one for all: leave branching out, or past_key_values and "
                "return_dict_in_generate."
            )

    def _step(self) -> None:
        began = self.clock()
        draft = self._draft()
        drafted_at = self.clock()
        pad = self._pad()
        pending = [row[-1] if on else pad for row, on in zip(self.rows.lists, self.active, strict=True)]
        first = draft.tokens.new_tensor(pending)[:, None]
        n = draft.tokens.shape[1]
        tokens = torch.cat((first, draft.tokens.clamp(min=0)), 1) if n else first
        parents = None if draft.parents is None else [-1, *(parent + 1 for parent in draft.parents)]
        logits = self.reader.feed(tokens, parents)
        self._take(draft, logits, slots=1)
        ended = self.clock()
        self.statistics.draft_seconds += drafted_at - began
        self.statistics.verify_seconds += ended - drafted_at
        levels = max(_depths(draft), default=0)
        self.control.time(n, 0 if self.free else levels, drafted_at - began, ended - drafted_at)

    def _draft(self) -> Draft:
        """The draft for this step, perhaps of no tokens."""
        none = Draft(torch.empty(self.b, 0, dtype=torch.int64, device=self.reader.positions.device))
        room = min(self.limit - len(row) for row, on in zip(self.rows.lists, self.active, strict=True) if on) - 1
        depth = min(room, len(self.owner.branching)) if self.free else self.control.depth(room)
        if depth < 1 or not self.input_ids.shape[1]:
            return none
        scorer = Scorer(self.greedy, self.scores, self.model.config.get_text_config(decoder=True).vocab_size,
                        none.tokens.device)  # fmt: skip
        draft = self.drafter.propose(self.rows.lists, self.owner.branching[:depth], scorer)
        if draft is None:
            return none
        if not isinstance(draft, Draft):
            draft = Draft.chains(draft, none.tokens.device)
        self._check_draft(draft, scorer.vocab_size)
        if self.free and draft.parents is None:
            draft = draft.shortened(self.control.depth(min(room, draft.tokens.shape[1]), draft.strength, free=True))
        return draft

    def _check_draft(self, draft: Draft, vocab_size: int) -> None:
        tokens = draft.tokens
        if tokens.ndim != 2 or tokens.shape[0] != self.b:
            raise ValueError(f"The draft has tokens of shape {tuple(tokens.shape)}, and the batch {self.b} rows.")
        if tokens.numel() and int(tokens.max()) >= vocab_size:
            raise ValueError(
                f"The draft has token {int(tokens.max())}, and the target's vocabulary {vocab_size} tokens: it was "
                "made with another tokenizer."
            )
        if draft.parents is not None and any(not -1 <= p < i for i, p in enumerate(draft.parents)):
            raise ValueError("Each of a draft's parents must be -1 or an earlier token's number.")

    def _take(self, draft: Draft, logits: Tensor, slots: int) -> None:
        """Verifies a draft by the logits (b, n + 1, v), writes what is accepted, and settles the cache."""
        scores = self._scored(draft, logits)
        paths, after = verify(draft, scores, greedy=self.greedy)
        drafted = draft.tokens.tolist()
        new, ends = [], []
        for row in range(self.b):
            tokens = [drafted[row][i] for i in paths[row]] + [after[row]]
            end = self.stops.first(self.rows, row, tokens, self._scores_so_far(row)) if self.active[row] else None
            new.append(tokens[:end])
            ends.append(end is not None)
        if slots:
            self._record(draft, drafted, paths, new, ends)
        counts = [len(tokens) for tokens in new]
        if not self.ragged and self.b > 1:
            going = [c for c, end, on in zip(counts, ends, self.active, strict=True) if on and not end]
            shared = min(going) if going else max(c for c, on in zip(counts, self.active, strict=True) if on)
            ends = [end and count <= shared for end, count in zip(ends, counts, strict=True)]
            new, counts = [tokens[:shared] for tokens in new], [min(count, shared) for count in counts]
        self._settle(draft, paths, counts, ends, slots)
        self._write(new, paths, ends, scores, logits, bool(slots))

    def _settle(self, draft: Draft, paths: list[list[int]], counts: list[int], ends: list[bool], slots: int) -> None:
        """Leaves in the cache the token before the draft and what was accepted, but for each row's last token."""
        if not slots:
            return
        kept = [[0, *(i + 1 for i in path[: count - 1])] for path, count in zip(paths, counts, strict=True)]
        going = [path for path, on in zip(kept, self.active, strict=True) if on]
        most = max(going, key=len)
        # rows that have ended take part in nothing; theirs is any path of full length
        kept = [path if on else most for path, on in zip(kept, self.active, strict=True)]
        if not self.ragged:
            kept = [path if len(path) == len(most) else most for path in kept]
        self.reader.commit(kept)

    def _write(
        self,
        new: list[list[int]],
        paths: list[list[int]],
        ends: list[bool],
        scores: Tensor,
        logits: Tensor,
        stepped: bool,
    ) -> None:
        for row, tokens in enumerate(new):
            if not self.active[row]:
                continue
            for kept, source in ((self.kept_scores, scores), (self.kept_logits, logits)):
                if kept is not None:
                    places = [0, *(i + 1 for i in paths[row])][: len(tokens)]
                    kept[row] += list(source[row, places].float())
            self.rows.append(row, tokens)
            self.statistics.tokens += len(tokens) if stepped else 0
            if ends[row]:
                self.active[row] = False
        if self.owner.streamer is not None:
            self.owner.streamer.put(torch.tensor(new[0]))

    def _scored(self, draft: Draft, logits: Tensor) -> Tensor:
        """Scores (b, n + 1, v): as the logits processors would make them, each after its own tokens."""
        if self.plain:
            return logits.float()
        b, places, v = logits.shape
        drafted = draft.tokens.clamp(min=0).tolist()
        parents = draft.parents if draft.parents is not None else list(range(-1, places - 2))
        numbers, prefixes = [], []
        for row in range(b):
            added: list[list[int]] = [[]]
            for i, parent in enumerate(parents):
                added.append([*added[parent + 1], drafted[row][i]])
            numbers += [row] * places
            prefixes += [self.rows.text(row, tokens) for tokens in added]
        return self.scores(numbers, prefixes, logits.reshape(b * places, v)).view(b, places, v)

    def _record(
        self,
        draft: Draft,
        drafted: list[list[int]],
        paths: list[list[int]],
        new: list[list[int]],
        ends: list[bool],
    ) -> None:
        depths = _depths(draft)
        for row in range(self.b):
            if not self.active[row]:
                continue
            available = max((d for d, token in zip(depths, drafted[row], strict=True) if token >= 0), default=0)
            accepted = len(paths[row])
            self.statistics.target_forwards += 1
            self.statistics.plain_forwards += available == 0
            self.statistics.record(available, accepted)
            if available:
                self.control.record(draft.strength, available, accepted)
            if accepted < available and not (ends[row] and len(new[row]) <= accepted):
                self.refused[row].append(len(self.rows.lists[row]) + accepted)

    def _scores_so_far(self, row: int) -> Any:
        return None if self.kept_scores is None else tuple(score[None] for score in self.kept_scores[row])

    def _pad(self) -> int:
        pad = self.config._pad_token_tensor
        return 0 if pad is None else int(pad)

    def _write_log(self, path: Path) -> None:
        with path.open("a", encoding="utf-8") as file:
            mask = _mask_of(self.kwargs.get("attention_mask"), self.input_ids)
            pads = [0] * self.b if mask is None else (mask == 0).sum(1).tolist()
            for row, refused, start in zip(self.rows.lists, self.refused, pads, strict=True):
                places = [place - start for place in refused if place < len(row)]
                file.write(json.dumps({"input_ids": row[start:], "rejected": places}) + "\n")

    def _result(self) -> Any:
        ids = self.rows.stacked(self._pad())
        if not self.config.return_dict_in_generate:
            return ids
        output: Any = SpeculativeOutput
        return output(
            sequences=ids,
            scores=_by_step(self.kept_scores),
            logits=_by_step(self.kept_logits),
            past_key_values=self.reader.cache,
            statistics=self.statistics,
        )


def _depths(draft: Draft) -> list[int]:
    """Of each drafted token, from 1."""
    if draft.parents is None:
        return list(range(1, draft.tokens.shape[1] + 1))
    found: list[int] = []
    for parent in draft.parents:
        found.append(found[parent] + 1 if parent >= 0 else 1)
    return found


def _by_step(kept: list[list[Tensor]] | None) -> tuple[Tensor, ...] | None:
    """One tensor (b, v) for each step; zeros where a row has ended."""
    if kept is None:
        return None
    steps = max(len(row) for row in kept)
    zero = torch.zeros_like(kept[0][0])
    return tuple(torch.stack([row[i] if i < len(row) else zero for row in kept]) for i in range(steps))


def _mask_of(mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """The part of a mask that covers the prompts."""
    return None if mask is None else mask[:, mask.shape[1] - input_ids.shape[1] :]


def _is_plain(value: Any) -> bool:
    """Whether a forward's argument says the same at every step, as flags do and tensors of the prompt don't."""
    return value is None or isinstance(value, bool | int | float | str)


def _clock(device: torch.device) -> Callable[[], float]:
    """CPU seconds of the process on a CPU, which other processes don't disturb; else wall time."""
    if device.type == "cpu":
        return time.process_time

    def now() -> float:
        torch.get_device_module(device).synchronize()
        return time.perf_counter()

    return now
