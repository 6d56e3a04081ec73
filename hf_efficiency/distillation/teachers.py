"""What the loss asks of a teacher, whether it is a model or a cache.

Shape legend: b batch, t tokens, n rows (tokens with a label), d features, h heads.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_efficiency.distillation.heads import LogitsHead, OutputHead
from hf_efficiency.distillation.targets import TopK
from hf_efficiency.distillation.teacher_cache import TeacherCache
from hf_efficiency.distillation.trace import Trace, trace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelRows:
    """A teacher's logits of some tokens, made when they are asked for.

    Attributes:
        hidden: (n, d), on the teacher's device.
        head: The teacher's.
        device: The student's, where the logits go.
    """

    hidden: Tensor
    head: OutputHead
    device: torch.device

    @torch.no_grad()
    def __call__(self, part: slice) -> Tensor:
        """Logits (c, V) of a slice of the rows."""
        return self.head(self.hidden[part]).to(self.device)


@dataclass(frozen=True)
class CachedRows:
    """The rows of a cache that belong to a batch."""

    rows: TopK

    def __call__(self, part: slice) -> TopK:
        """Those of a slice."""
        return TopK(self.rows.ids[part], self.rows.log_p[part], self.rows.log_rest[part])


@dataclass(frozen=True)
class Answer:
    """What a teacher has to say on a batch.

    Attributes:
        rows: From a slice of the n rows to a target.
        states: Output (n, d) of the blocks asked for.
        attentions: (b, h, t, t) of the blocks asked for.
    """

    rows: ModelRows | CachedRows
    states: dict[int, Tensor] = field(default_factory=dict)
    attentions: dict[int, Tensor] = field(default_factory=dict)


class Teacher(Protocol):
    """A source of targets."""

    @property
    def vocab_size(self) -> int:
        """Columns of its logits."""

    def answer(
        self, inputs: Mapping[str, Any], valid: Tensor, layers: Collection[int] = (), attentions: Collection[int] = ()
    ) -> Answer:
        """What it says after the tokens where `valid` (b, t - 1) is true; the same device as `valid`."""


class ModelTeacher:
    """A teacher that runs, wherever it is and in whatever its weights are stored.

    Args:
        model: A causal language model. It is put into evaluation mode; its weights get no gradients.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self._plain: bool | None = None

    @property
    def vocab_size(self) -> int:
        """Columns of its logits."""
        return OutputHead(self.model).size

    def _moved(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs where the model takes them. One whose weights are offloaded moves them itself."""
        device = self.model.get_input_embeddings().weight.device
        if device.type == "meta":
            return dict(inputs)
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}

    @torch.no_grad()
    def answer(
        self, inputs: Mapping[str, Any], valid: Tensor, layers: Collection[int] = (), attentions: Collection[int] = ()
    ) -> Answer:
        """See `Teacher`."""
        self.model.eval()
        moved = self._moved(inputs)
        head: OutputHead = OutputHead(self.model)
        found = self._run(moved, layers, attentions, full=self._plain is False)
        if self._plain is None:
            self._plain = head.agrees(found.hidden[:, :1], found.logits)
            if not self._plain:
                logger.warning(
                    "The logits of %s are no plain function of its head: they are held whole.",
                    type(self.model).__name__,
                )
                found = self._run(moved, layers, attentions, full=True)
        hidden = found.hidden if self._plain else found.logits
        head = head if self._plain else LogitsHead()
        there = valid.to(hidden.device)
        states = {i: state[:, :-1][valid.to(state.device)].to(valid.device) for i, state in found.states.items()}
        return Answer(ModelRows(hidden[:, :-1][there], head, valid.device), states, found.attentions)

    def _run(
        self, inputs: Mapping[str, Any], layers: Collection[int], attentions: Collection[int], *, full: bool
    ) -> Trace:
        return trace(self.model, inputs, layers=layers, attentions=attentions, full_logits=full)


class CachedTeacher:
    """A teacher that was run before."""

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache

    @property
    def vocab_size(self) -> int:
        """Columns of the logits that were cached."""
        return self.cache.vocab_size

    def answer(
        self, inputs: Mapping[str, Any], valid: Tensor, layers: Collection[int] = (), attentions: Collection[int] = ()
    ) -> Answer:
        """See `Teacher`.

        Raises:
            ValueError: States or attention are asked for, which a cache does not hold.
        """
        if layers or attentions:
            raise ValueError("A teacher cache holds no hidden states and no attention maps: pass the teacher itself.")
        return Answer(CachedRows(self.cache.lookup(inputs["input_ids"], inputs["attention_mask"], valid)))
