import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from hf_efficiency.evaluation import EvaluationText, Measurements, Report, bytes_on_disk, compare, perplexity
from hf_efficiency.evaluation.report import OWN_PROCESS, number, size
from tests import tiny


@pytest.fixture
def report():
    return Report(
        model=Measurements(29.3125, 80_000_000, 6.25, 4.3125, 600_000_000, 90.0, 30.5, "Because ```x``` it {{ is }}."),
        reference=Measurements(25.5, 269_000_000, 16.0, None, 800_000_000, 100.0, 20.25, "Because."),
        mean_kl=0.123456,
        top1_agreement=0.8125,
        context={
            "text": "a text, 10 characters",
            "window": 512,
            "windows": 16,
            "tokens": 8176,
            "dtype": "bfloat16",
            "device": "a processor",
            "threads": 2,
            "versions": {"torch": "2.13.0", "python": "3.11.7"},
            "quantization": {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False},
            "prompt": "Why?",
            "command": "hf-efficiency quantize some/model --bits 4",
            "calibration": "another text",
            "base_model": "some/model",
            "license": "apache-2.0",
            "languages": ["en"],
            "memory_scope": OWN_PROCESS,
        },
    )


def test_compare_measures_both_models(tiny_tokenizer, texts):
    model, reference = (tiny.build_llama(seed, vocab_size=len(tiny_tokenizer)) for seed in (0, 1))
    settings = {"window": 32, "max_windows": 3}
    report = compare(
        model.to(torch.bfloat16), reference, tiny_tokenizer, texts, **settings, prompt="Hi", repeats=1, decode_tokens=2
    )
    assert report.model.perplexity == pytest.approx(perplexity(model, tiny_tokenizer, texts, **settings), rel=1e-4)
    assert report.reference.perplexity == pytest.approx(
        perplexity(reference, tiny_tokenizer, texts, **settings), rel=1e-4
    )
    assert report.mean_kl > 0
    assert 0 <= report.top1_agreement < 1
    assert (report.model.bits_per_weight, report.reference.bits_per_weight) == (16, 32)
    assert 2 * report.model.bytes_on_disk == report.reference.bytes_on_disk == bytes_on_disk(reference)
    assert isinstance(report.model.answer, str)
    assert report.model.decode_tokens_per_second > 0
    assert report.model.peak_memory > 0
    context = report.context
    assert (context["windows"], context["tokens"], context["dtype"]) == (3, 93, "bfloat16")
    assert context["text"] == f"{len(texts)} texts"
    assert context["memory_scope"] == "one process that holds both models"
    assert Report.from_json(report.to_json()) == report


def test_compare_without_speed_and_with_context(tiny_llama, tiny_tokenizer, texts):
    named = EvaluationText("\n\n".join(texts), "paragraphs")
    context = {"command": "by hand"}
    report = compare(
        tiny_llama, tiny_llama, tiny_tokenizer, named, window=32, max_windows=1, speed=False, context=context
    )
    assert report.model.decode_tokens_per_second is None
    assert (report.context["text"], report.context["command"]) == ("paragraphs", "by hand")
    assert "tokens/s" not in report.table()


def test_json_round_trip(report, tmp_path):
    path = tmp_path / "report.json"
    text = report.to_json(path)
    assert path.read_text() == text
    assert Report.from_json(path) == Report.from_json(str(path)) == Report.from_json(text) == report
    assert json.loads(text)["model"]["perplexity"] == 29.3125


def test_json_of_a_destroyed_model_is_still_json(report):
    report.model.perplexity = math.inf
    text = report.to_json()
    assert json.loads(text)["model"]["perplexity"] is None
    assert Report.from_json(text) == report
    assert "not finite" in report.table()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a report"),
        ("[]", "no field 'format'"),
        ('{"format": 2}', "another version than 1"),
        ('{"format": 1}', "not a report: 'model'"),
        ('{"format": 1, "model": {"x": 1}, "reference": {}}', "not a report: .*'x'"),
    ],
)
def test_from_json_of_something_else(text, message):
    with pytest.raises(ValueError, match=message):
        Report.from_json(text)


def test_table(report):
    lines = report.table().splitlines()
    assert lines[0].split() == ["original", "compressed"]
    assert lines[1].endswith("25.50       29.31")
    assert len({len(line) for line in lines}) == 1
    assert "269.0 MB     80.0 MB" in report.table()
    assert "81.2 %" in report.table()  # half to even, as Python prints 81.25


@pytest.mark.parametrize(
    ("value", "text"),
    [(29.3125, "29.31"), (1249.4, "1,249"), (0.0712345, "0.0712"), (0.5, "0.5000"), (15.9953, "16.00"), (0, "0"),
     (3e-6, "3e-06"), (16.0, "16"), (math.inf, "not finite")],
)  # fmt: skip
def test_number(value, text):
    assert number(value) == text


def test_size():
    assert (size(268_999_999), size(1.5e9)) == ("269.0 MB", "1.50 GB")


def test_plot_is_a_png_of_readable_size(report, tmp_path):
    path = report.plot(tmp_path / "plot.png")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
    assert width > 1200
    assert height > 400


def test_plot_leaves_out_what_was_not_measured(report, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    widths = []
    subplots = Figure.subplots
    monkeypatch.setattr(
        Figure, "subplots", lambda self, rows, n, **kw: widths.append(n) or subplots(self, rows, n, **kw)
    )
    report.plot(tmp_path / "all.png")
    report.context["memory_scope"] = "one process that holds both models"
    report.reference.decode_tokens_per_second = None
    report.model.perplexity = math.inf
    report.plot(tmp_path / "fewer.png")
    assert widths == [5, 3]


def test_card_metadata(report):
    data = report.to_card(plot="report.png", repo_id="me/mine").data
    assert data.base_model == "some/model"
    assert data.base_model_relation == "quantized"
    assert data.license == "apache-2.0"
    assert data.language == ["en"]
    assert data.library_name == "transformers"
    assert {"hf_efficiency", "gptq", "4-bit"} <= set(data.tags)
    assert data.quantization == {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False}
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "perplexity": 29.3125,
        "kl_divergence": 0.12346,
        "top1_agreement": 0.8125,
    }


def test_card_reads_back_as_the_hub_would(report):
    content = str(report.to_card(plot="report.png"))
    back = ModelCard(content, ignore_metadata_errors=False)
    assert back.data.model_name == "model GPTQ 4-bit"
    assert len(back.data.eval_results) == 3
    assert yaml.safe_load(content.split("---")[1])["model-index"][0]["name"] == "model GPTQ 4-bit"


def test_card_body(report):
    text = report.to_card(plot="report.png", repo_id="me/mine").text
    for label, before, after in report.rows():
        assert f"\n| {label} | {before} | {after} |\n" in text
    assert "![Original and compressed model side by side](report.png)" in text
    assert 'AutoModelForCausalLM.from_pretrained("me/mine")' in text
    assert "import hf_efficiency" in text
    assert "hf-efficiency quantize some/model --bits 4" in text
    assert "Calibration text: another text. Evaluation text: a text, 10 characters." in text
    # the answer's own backticks do not end its fence, and its braces are no template
    assert "\n````text\nBecause ```x``` it {{ is }}.\n````\n" in text
    assert "\n\n\n" not in text


def test_card_of_a_report_with_little_context(report):
    report.context = {"text": "t"}
    report.model.answer = report.reference.answer = None
    card = report.to_card()
    assert "No calibration text was used." in card.text
    assert "One prompt" not in card.text
    assert "base_model" not in card.data.to_dict()


def test_card_needs_to_know_the_text(report):
    report.context = {}
    with pytest.raises(ValueError, match="no 'text'"):
        report.to_card()


def test_template_lies_in_the_package():
    import hf_efficiency.evaluation as package

    assert Path(package.__file__).with_name("card.md").is_file()
