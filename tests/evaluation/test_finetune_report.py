"""The report of a fine-tuning: its numbers, its card, its plot."""

import json
import math

import pytest

from hf_efficiency.evaluation.finetune_report import FinetuneReport


def report(**changes):
    values = {
        "losses": [3.0, 2.5, 2.25],
        "loss_before": math.log(40),
        "loss_after": math.log(31.5),
        "held_out_tokens": 1000,
        "trainable_parameters": 2_000,
        "parameters": 1_000_000,
        "adapter_bytes": 8_000_000,
        "optimizer_bytes": 16_000_000,
        "peak_memory": 1_500_000_000,
        "seconds": 12.3,
        "context": {
            "peft_type": "LORA",
            "data": "a.txt",
            "held_out": "the last 5 % of it",
            "load": 'base = load("x")',
            "base_model": "me/model",
            "license": "mit",
            "quantization": "nf4",
            "command": "hf-efficiency finetune me/model",
            "device": "cpu",
            "dtype": "float32",
            "processes": 1,
            "settings": {"r": 8},
            "versions": {"torch": "2.13"},
        },
    }
    return FinetuneReport(**{**values, **changes})


def test_rows():
    rows = dict(report().rows())
    assert rows["Held-out perplexity before"] == "40"
    assert rows["Held-out perplexity after"] == "31.50"
    assert rows["Trainable parameters"] == "2,000 (0.2 %)"
    assert rows["Optimizer state"] == "16.0 MB"
    assert rows["Training loss, first and last step"] == "3.000, 2.250"


def test_json_and_what_is_not_finite(tmp_path):
    report(losses=[1.0, math.nan], loss_after=math.inf).to_json(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["losses"] == [1.0, None]
    assert data["loss_after"] is None
    assert data["loss_before"] == math.log(40)
    assert dict(report(loss_after=1e4).rows())["Held-out perplexity after"] == "not finite"
    assert "model-index" not in report(loss_after=math.inf).to_card("p.png").data.to_dict()


def test_card():
    card = report().to_card("loss.png")
    data = card.data.to_dict()
    assert (data["base_model"], data["license"], data["library_name"]) == ("me/model", "mit", "peft")
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(31.5)
    text = str(card)
    for part in (
        "whose weights stayed in nf4",
        'base = load("x")',
        "![Training loss](loss.png)",
        '"r": 8',
        "1 process.",
    ):
        assert part in text
    assert "2 processes." in str(report(context={**report().context, "processes": 2}).to_card("loss.png"))


@pytest.mark.parametrize("steps", [1, 3, 400])
def test_plot(steps, tmp_path):
    report(losses=[2.0 + 1 / (1 + i) for i in range(steps)]).plot(tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
