"""Speculative decoding for `model.generate(..., custom_generate=speculative(draft=...))`.

Shape legend: b rows, n drafted tokens, v tokens of the vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_efficiency.generation.speculative import LookupDrafter, SpeculativeStatistics, check_shape
from hf_efficiency.integrations.transformers.speculative_drafters import ModelDrafter, SkipLayers
from hf_efficiency.integrations.transformers.speculative_run import Run
from transformers import AutoModelForCausalLM, PreTrainedModel


def speculative(
    draft: Any = "lookup",
    *,
    k: int = 8,
    branching: Sequence[int] | None = None,
    adapt: bool = True,
    streamer: Any = None,
    log: str | Path | None = None,
) -> "SpeculativeDecoding":
    """What `generate(custom_generate=...)` takes: drafted tokens, verified several at a time by the model.

    The text is that of plain generation: with greedy decoding the same tokens, with sampling the same distribution.

    Args:
        draft: Who drafts: `"lookup"` (from the text itself), a smaller model or its folder, `SkipLayers(...)` (the
            model's own blocks), `"self"` (the model itself), or any `Drafter`.
        k: Longest chain of drafted tokens.
        branching: For a tree: children of each node by depth, such as (3, 2, 1), instead of k.
        adapt: Draft as deep as pays, by the acceptance and times measured, and not at all where nothing does.
        streamer: transformers hands `generate(streamer=...)` to no custom decoding: give it here, and not there.
        log: A .jsonl file, to which each text is added with the places where the target refused a draft: data for
            `hf-efficiency distill-draft`.

    Raises:
        ValueError: k or branching out of range, or an unknown draft.
        TypeError: A draft that can't draft.
    """
    shape = check_shape(k, branching)
    if isinstance(draft, str) and draft == "lookup":
        draft = LookupDrafter()
    elif isinstance(draft, str | Path) and draft != "self":
        draft = ModelDrafter(AutoModelForCausalLM.from_pretrained(draft, dtype="auto").eval())
    elif isinstance(draft, PreTrainedModel):
        draft = ModelDrafter(draft)
    elif draft != "self" and not isinstance(draft, SkipLayers) and not callable(getattr(draft, "propose", None)):
        raise TypeError(
            f"draft is a {type(draft).__name__}: give 'lookup', 'self', a causal language model or its folder, "
            "SkipLayers(...), or an object with begin(...) and propose(...)."
        )
    if isinstance(draft, LookupDrafter) and max(shape) > 1:
        raise ValueError("draft='lookup' gives chains: leave branching out.")
    return SpeculativeDecoding(draft, shape, adapt, streamer, None if log is None else Path(log))


class SpeculativeDecoding:
    """See `speculative`.

    Attributes:
        statistics: Of the last call of `generate`; also of one that was interrupted.
    """

    def __init__(self, draft: Any, branching: tuple[int, ...], adapt: bool, streamer: Any, log: Path | None) -> None:
        self.draft, self.branching, self.adapt, self.streamer, self.log = draft, branching, adapt, streamer, log
        self.statistics = SpeculativeStatistics()

    def drafter(self, model: PreTrainedModel) -> Any:
        """The drafter for a target.

        Raises:
            ValueError: The draft doesn't fit the target.
        """
        if isinstance(self.draft, SkipLayers):
            return self.draft.drafter(model)
        drafter = ModelDrafter(model) if isinstance(self.draft, str) else self.draft
        if isinstance(drafter, ModelDrafter):
            drafter.check(model)
        return drafter

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding loop that `generate` calls."""
        _check_settings(model, generation_config, self.streamer, input_ids)
        drafter, given = self.drafter(model), (logits_processor, stopping_criteria, generation_config, model_kwargs)
        run = Run(drafter, self, model, input_ids, *given)
        self.statistics = run.statistics
        return run.generate()


def _check_settings(model: Any, config: Any, streamer: Any, input_ids: Tensor) -> None:
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} has an encoder: speculative decoding here is for decoders only.")
    if config.num_beams > 1:
        raise ValueError(f"num_beams is {config.num_beams}: speculative decoding has no beams; set num_beams=1.")
    if not config.use_cache:
        raise ValueError("use_cache=False: speculative decoding needs the cache; leave use_cache at True.")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise ValueError(f"{name}=True is not given here, since steps verify several tokens: leave it out.")
    if streamer is not None and input_ids.shape[0] > 1:
        raise ValueError(f"A streamer takes one text at a time, and the batch has {input_ids.shape[0]} rows.")
