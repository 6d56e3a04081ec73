import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_efficiency
from hf_efficiency import cli
from hf_efficiency.cli import quantize as command
from hf_efficiency.cli.fresh import FreshRun
from hf_efficiency.evaluation import Report, bytes_on_disk, default_text, perplexity
from tests.cli.conftest import SMALL


@pytest.fixture
def quick(monkeypatch):
    """No second process: its answer is made up."""
    calls = []

    def run_fresh(folder, dtype, device, *, prompt=None, check=None):
        calls.append(folder)
        return FreshRun(10_000_000, None if check is None else True, 0.0, 100.0, 20.0)

    monkeypatch.setattr(command, "run_fresh", run_fresh)
    return calls


def test_the_folder_is_a_whole_checkpoint(quantized_dir):
    names = {path.name for path in quantized_dir.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "report.json", "report.png"} <= names
    assert not any(name.startswith(".") for name in names)
    assert sorted(path.name for path in quantized_dir.parent.iterdir()) == ["tiny", "tiny-gptq4"]
    config = json.loads((quantized_dir / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", 4, 32)
    assert "calibration" not in json.dumps(config)


def test_report_holds_what_can_be_measured_again(quantized_dir):
    report = Report.from_json(quantized_dir / "report.json")
    hf_efficiency.prefer("gptq")
    model, original = (AutoModelForCausalLM.from_pretrained(quantized_dir.parent / n) for n in ("tiny-gptq4", "tiny"))
    tokenizer = AutoTokenizer.from_pretrained(quantized_dir)
    text = default_text().text
    for entry, loaded in ((report.model, model), (report.reference, original)):
        assert entry.perplexity == pytest.approx(perplexity(loaded, tokenizer, text, 32, 2), rel=1e-4)
        assert entry.decode_tokens_per_second > 0
        assert entry.peak_memory > 50_000_000
        assert isinstance(entry.answer, str)
    assert report.model.bytes_on_disk == bytes_on_disk(quantized_dir) < report.reference.bytes_on_disk
    # 4 bits, and 16 + 4 bits a group of 32, and the group index
    assert 4.6 < report.model.bits_per_quantized_weight < 5.5
    assert report.reference.bits_per_weight == 32
    assert report.mean_kl > 0


def test_report_says_how_it_was_made(quantized_dir):
    context = Report.from_json(quantized_dir / "report.json").context
    assert context["command"].startswith("hf-efficiency quantize ")
    assert "--group-size 32" in context["command"]
    assert "pydoc_data.topics" in context["calibration"]
    assert "2 sequences of 32 tokens" in context["calibration"]
    assert context["shared_with_calibration"] == 0
    assert "docstring prose" in context["text"]
    assert (context["windows"], context["prompt"]) == (2, "Once upon")
    assert context["memory_scope"] == "a process that runs only this model"
    assert context["versions"]["hf_efficiency"] == hf_efficiency.__version__


def test_card_is_made_from_the_report(quantized_dir):
    card = ModelCard.load(quantized_dir / "README.md")
    report = Report.from_json(quantized_dir / "report.json")
    assert card.data.library_name == "transformers"
    assert "gptq" in card.data.tags
    assert card.data.eval_results[0].metric_value == round(report.model.perplexity, 5)
    for label, before, after in report.rows():
        assert f"| {label} | {before} | {after} |" in card.text
    assert report.context["command"] in card.text
    # the folder's own path is no Hub id, so it must not stand as the base model
    assert "base_model" not in card.data.to_dict()


def test_table_on_the_terminal(tiny_llama_dir, tmp_path, quick, capsys):
    argv = ["quantize", str(tiny_llama_dir), "--method", "rtn", "--bits", "8", "--group-size", "32"]
    argv += ["--window", "32", "--max-windows", "1", "--output", str(tmp_path / "o")]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert out.split()[:2] == ["original", "compressed"]
    assert "Perplexity" in out
    assert "logits identical after reloading" in out
    report = Report.from_json(tmp_path / "o" / "report.json")
    assert "calibration" not in report.context
    assert report.model.decode_tokens_per_second == 20


@pytest.mark.parametrize(
    ("method", "options", "settings"),
    [
        ("rtn", ["--bits", "3", "--sym", "--group-size", "32"], {"bits": 3, "sym": True}),
        ("rtn", ["--refine-steps", "2", "--group-size", "32"], {"refine_steps": 2}),
        ("gptq", ["--desc-act", "--set", "damp_percent=0.05", "--group-size", "32"], {"damp_percent": 0.05}),
        ("awq", ["--group-size", "32"], {"quant_method": "awq"}),
        ("nf4", ["--set", "block_size=32"], {"quant_method": "bitsandbytes"}),
        ("quip-sharp", ["--bits", "2", "--fine-tune", "1"], {"quant_method": "quip_sharp", "fine_tune_steps": 1}),
    ],
)
def test_every_method(method, options, settings, tiny_llama_dir, tmp_path, quick):
    """The options reach the config, the report names the method, and the checkpoint loads."""
    needs_data = method not in ("rtn", "nf4") or "--refine-steps" in options
    argv = ["quantize", str(tiny_llama_dir), "--method", method, *options, "--output", str(tmp_path / "o")]
    argv += SMALL if needs_data else SMALL[4:]
    assert cli.main(argv) == 0
    report = Report.from_json(tmp_path / "o" / "report.json")
    stored = report.context["quantization"]
    assert {key: stored.get(key, stored.get("meta", {}).get(key)) for key in settings} == settings
    assert ("calibration" in report.context) == needs_data
    assert report.model.bits_per_quantized_weight < 9
    card = ModelCard.load(tmp_path / "o" / "README.md")
    assert method in card.data.tags
    assert card.text.strip().startswith("# QuIP#" if method == "quip-sharp" else f"# {method.upper()}")


def test_calibration_from_a_file(tiny_llama_dir, tmp_path, quick, texts):
    (tmp_path / "own.txt").write_text("\n".join(texts[:20]))
    argv = ["quantize", str(tiny_llama_dir), "--method", "gptq", "--group-size", "32", *SMALL]
    argv += ["--calibration", str(tmp_path / "own.txt"), "--output", str(tmp_path / "o")]
    assert cli.main(argv) == 0
    assert "own.txt" in Report.from_json(tmp_path / "o" / "report.json").context["calibration"]
    assert "own.txt" not in (tmp_path / "o" / "config.json").read_text()


def test_checkpoint_that_reloads_differently_is_not_kept(tiny_llama_dir, tmp_path, monkeypatch, capsys):
    out = tmp_path / "o"
    out.mkdir()
    (out / "config.json").write_text("old")
    monkeypatch.setattr(command, "run_fresh", lambda *args, **kwargs: FreshRun(1, False, 0.5))
    argv = ["quantize", str(tiny_llama_dir), "--method", "rtn", "--group-size", "32", "--window", "32", "--overwrite"]
    assert cli.main([*argv, "--output", str(out)]) == 1
    assert "differ by up to 0.5; nothing was written" in capsys.readouterr().err
    assert (out / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_resume_uses_and_removes_its_folder(tiny_llama_dir, tmp_path, quick, monkeypatch):
    out = tmp_path / "o"
    argv = ["quantize", str(tiny_llama_dir), "--method", "gptq", "--group-size", "32", *SMALL, "--resume", "--no-eval"]
    argv += ["--output", str(out)]

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "run_fresh", stopped)
        assert cli.main(argv) == 130
    assert list((tmp_path / "o.resume").glob("block-*"))
    assert not out.exists()
    assert cli.main(argv) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    assert not (out / "README.md").exists()


def arguments(folder, out, *rest):
    return ["quantize", folder, "--method", "gptq", "--output", out, "--window", "32", *rest]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--bits", "5"], "5"),
        (["--group-size", "0"], "group_size=0"),
        (["--fine-tune", "5"], "--fine-tune: the method gptq has no such option"),
        (["--set", "damp_percent=7"], "damp_percent=7"),
        (["--set", "damping=1"], "--set damping: the method gptq has no such field; it has .*damp_percent"),
        (["--set", "calibration=1"], "--set calibration: the method gptq has no such field"),
        (["--set", "damp_percent"], "write it as NAME=VALUE"),
        (["--num-samples", "0"], "num_samples=0"),
        (["--calibration", "missing.txt"], r"cannot read the text file 'missing\.txt'"),
        (["--eval-text", "missing.txt"], r"cannot read the text file 'missing\.txt'"),
        (["--device", "cuda:99"], "--device cuda:99: this machine has no such device"),
        (["--window", "1"], "window is 1"),
        (["--window", "513"], "window is 513 tokens, but the model reads at most 512"),
        (["--max-windows", "0"], "--max-windows is 0"),
        (["--prompt", " "], "--prompt is empty"),
    ],
)
def test_bad_arguments_cost_nothing(extra, message, tiny_llama_dir, tmp_path, fails, monkeypatch):
    """One line, status 2, no folder, and no model was loaded for it."""
    monkeypatch.setattr(command, "load_model", lambda *args: pytest.fail("loaded a model first"))
    out = tmp_path / "o"
    line = fails(*arguments(tiny_llama_dir, out, *extra))
    assert re.search(message, line), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extra", [["--desc-act"], ["--calibration", "default"]])
def test_rtn_has_neither_order_nor_calibration(extra, tiny_llama_dir, tmp_path, fails):
    line = fails("quantize", tiny_llama_dir, "--method", "rtn", "--output", tmp_path / "o", *extra)
    assert extra[0] in line


def test_evaluating_on_the_calibration_text_is_refused(tiny_llama_dir, tmp_path, fails, texts):
    (tmp_path / "a.txt").write_text("\n".join(texts[:40]))
    (tmp_path / "b.txt").write_text("\n".join(texts[30:60]))
    files = ["--calibration", tmp_path / "a.txt", "--eval-text", tmp_path / "b.txt"]
    assert "of the evaluation text occurs in the calibration text" in fails(
        *arguments(tiny_llama_dir, tmp_path / "o", *files)
    )


def test_models_that_are_none(tmp_path, fails):
    out = tmp_path / "o"
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in fails(*arguments(tmp_path / "empty", out))
    assert "does not exist" in fails(*arguments(tmp_path / "m.gguf", out))
    assert "no Hub id" in fails(*arguments("not/a/model", out))
    assert not out.exists()


def test_quantized_model_is_not_quantized_again(quantized_dir, tmp_path, fails):
    assert "already quantized (gptq): dequantize it first" in fails(*arguments(quantized_dir, tmp_path / "o"))


def test_output_with_something_else_in_it(tiny_llama_dir, tmp_path, fails):
    (tmp_path / "thesis.docx").write_text("")
    assert "'thesis.docx', which is no part of a checkpoint" in fails(
        *arguments(tiny_llama_dir, tmp_path, "--overwrite")
    )


def test_weights_with_nan(tiny_llama_dir, tmp_path, fails):
    bad = tmp_path / "bad"
    shutil.copytree(tiny_llama_dir, bad)
    model = AutoModelForCausalLM.from_pretrained(bad)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(bad)
    assert fails(*arguments(bad, tmp_path / "o", "--group-size", "32", *SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
