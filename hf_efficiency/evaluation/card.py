"""The model card of a compressed checkpoint, made from its report: no number in it is typed by hand."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_efficiency.evaluation.report import size

if TYPE_CHECKING:
    from hf_efficiency.evaluation.report import Report

# In a card that does not know its repository yet; `hf-efficiency push` puts the name in.
FOLDER_PLACEHOLDER = "path/to/this/folder"

# names that are not simply written in capitals
_SPELLED = {"quip-sharp": "QuIP#", "compressed": "Compressed"}

# settings of a quantization config worth a tag or a place in the title
_METHOD_KEYS = ("quant_method", "bits", "group_size", "block_size", "sym", "desc_act")


def make_card(report: Report, *, plot: str | None = None, repo_id: str | None = None) -> ModelCard:
    """A Hub model card with YAML metadata: base model, license, tags, and the measurements as `model-index`.

    `plot` is the picture's name beside the card, `repo_id` the name users will load; without it the card says where to
    put the folder's path.

    Raises:
        ValueError: `report.context` lacks the text that was read.
    """
    context = report.context
    if "text" not in context:
        raise ValueError("report.context has no 'text': say which text was read before making a card")
    quantization: dict[str, Any] = context.get("quantization") or {}
    base = context.get("base_model")
    method = _method_name(context, quantization)
    name = f"{str(base).rsplit('/', 1)[-1]} {method}" if base else f"{method} model"
    answers = (context.get("prompt") or "", report.reference.answer or "", report.model.answer or "")
    return ModelCard.from_template(
        _card_data(report, name, quantization),
        template_str=resources.files("hf_efficiency.evaluation").joinpath("card.md").read_text(encoding="utf-8"),
        title=name,
        summary=_summary(report, base, method),
        repo_id=repo_id or FOLDER_PLACEHOLDER,
        rows=report.rows(),
        plot=plot,
        method=_how_measured(report),
        fence=_fence(*answers),
        prompt=answers[0],
        reference_answer=answers[1],
        answer=answers[2],
        command=context.get("command"),
        calibration=context.get("calibration"),
        shared=_shared(context),
        text=context["text"],
        note=context.get("note"),
        quantization=json.dumps(quantization, indent=2, ensure_ascii=False, default=str),
        versions=", ".join(f"{key} {value}" for key, value in context.get("versions", {}).items()),
        tokens=f"{context.get('tokens', 0):,}",
    )


def _card_data(report: Report, name: str, quantization: dict[str, Any]) -> ModelCardData:
    context = report.context
    # the algorithm and the format it is stored in: RTN writes the format of GPTQ
    methods = [context.get("method"), quantization.get("quant_method")]
    bits = context.get("bits") or quantization.get("bits")
    tags = ["hf_efficiency", "quantized", *(str(method) for method in methods if method)]
    tags += [f"{bits}-bit"] if bits else []
    known: dict[str, Any] = {
        "base_model": context.get("base_model"),
        "base_model_relation": "quantized" if context.get("base_model") else None,
        "license": context.get("license"),
        "language": context.get("languages"),
        "quantization": {key: quantization[key] for key in _METHOD_KEYS if key in quantization} or None,
    }
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(tags)),
        model_name=name,
        eval_results=[
            _result(context["text"], "perplexity", "Perplexity", report.model.perplexity),
            _result(context["text"], "kl_divergence", "Mean KL to the original (nats)", report.mean_kl),
            _result(context["text"], "top1_agreement", "Top-1 agreement with the original", report.top1_agreement),
        ],
        ignore_metadata_errors=False,
        **{key: value for key, value in known.items() if value is not None},
    )


def _result(text: str, kind: str, name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type="text",
        dataset_name=text,
        metric_type=kind,
        metric_name=name,
        metric_value=round(value, 5),
    )


def _method_name(context: dict[str, Any], quantization: dict[str, Any]) -> str:
    """Such as "GPTQ 4-bit": the algorithm where the context names it, else the format."""
    method = str(context.get("method") or quantization.get("quant_method", "compressed")).replace("_", "-")
    method = _SPELLED.get(method, method.upper())
    bits = context.get("bits") or quantization.get("bits")
    return f"{method} {bits}-bit" if bits else method


def _summary(report: Report, base: str | None, method: str) -> str:
    source = f"[{base}](https://huggingface.co/{base})" if base else "a dense model"
    bits = report.model.bits_per_quantized_weight
    layers = f", {bits:.2f} bits for each weight of its linear layers" if bits else ""
    factor = report.reference.bytes_on_disk / report.model.bytes_on_disk
    return (
        f"{source} compressed with {method} by hf_efficiency{layers}: the weight files are {factor:.2f} times smaller."
    )


def _shared(context: dict[str, Any]) -> str | None:
    share = context.get("shared_with_calibration")
    if share is None:
        return None
    return f"{100 * share:.2g} % of the evaluation text's runs of eight words occur in the calibration text."


def _how_measured(report: Report) -> list[str]:
    context = report.context
    lines = [
        f"Text: {context['text']}.",
        f"Perplexity, KL and agreement: {context.get('tokens', 0):,} predicted tokens in {context.get('windows')} "
        f"separate windows of {context.get('window')} tokens, activations in {context.get('dtype')}, "
        "log-probabilities in float32.",
    ]
    if report.model.decode_tokens_per_second is not None:
        lines.append(
            f"Speed: medians at batch size 1 on {context.get('device')}, {context.get('threads')} threads; prefill "
            "of one window, then greedy decoding."
        )
    if "quantize_seconds" in context:
        lines.append(
            f"Making it took {context['quantize_seconds']} s, at a peak of {size(context['quantize_peak_memory'])} of "
            "memory of the whole process."
        )
    return lines


def _fence(*texts: str) -> str:
    """A code fence longer than any run of backticks in the texts."""
    longest = max((len(run) for text in texts for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)
