"""Let a model answer one prompt, the way its users would ask it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from hf_efficiency.evaluation.metrics import GREEDY, evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 96) -> str:
    """The model's greedy answer to `prompt`, through the tokenizer's chat template where it has one.

    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    encoded: Any
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    pad = model.generation_config.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    ids, mask = encoded["input_ids"].to(model.device), encoded["attention_mask"].to(model.device)
    with evaluating(model):
        output = cast("Any", model).generate(
            ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=0 if pad is None else pad, **GREEDY
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()
