import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import hf_efficiency
from hf_efficiency import cli
from hf_efficiency.cli import fresh, info
from hf_efficiency.cli.configs import parse_assignment
from hf_efficiency.evaluation import Report
from tests.fake_hub import FakeHub

ROOT = Path(__file__).parent.parent.parent


def main(*argv):
    return cli.main([str(argument) for argument in argv])


def test_evaluate_one_model(tiny_llama_dir, tmp_path, capsys, texts):
    (tmp_path / "t.txt").write_text("\n".join(texts))
    file = tmp_path / "m.json"
    argv = ["--text", tmp_path / "t.txt", "--window", 32, "--max-windows", 2, "--json", file]
    assert main("evaluate", tiny_llama_dir, *argv) == 0
    shown, measured = capsys.readouterr().out, json.loads(file.read_text())
    assert "t.txt" in shown
    assert measured["bits_per_weight"] == 32
    assert f"{measured['perplexity']:,.0f}" in shown


def test_evaluate_beside_the_original(quantized_dir, tmp_path, capsys):
    file = tmp_path / "r.json"
    argv = ["--reference", quantized_dir.parent / "tiny", "--window", 32, "--max-windows", 2, "--json", file]
    assert main("evaluate", quantized_dir, *argv) == 0
    report, made = Report.from_json(file), Report.from_json(quantized_dir / "report.json")
    assert report.mean_kl == pytest.approx(made.mean_kl, rel=1e-4)
    assert "Top-1 agreement" in capsys.readouterr().out


def test_dequantize(quantized_dir, tmp_path, tiny_tokens, fails):
    assert main("dequantize", quantized_dir, "--output", tmp_path / "dense") == 0
    hf_efficiency.prefer("gptq")
    dense, packed = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "dense", quantized_dir))
    assert getattr(dense.config, "quantization_config", None) is None
    with torch.no_grad():
        torch.testing.assert_close(dense(tiny_tokens).logits, packed(tiny_tokens).logits, atol=1e-4, rtol=1e-4)
    assert "not quantized" in fails("dequantize", tmp_path / "dense", "--output", tmp_path / "again")


def test_info_reads_headers_only(quantized_dir, capsys):
    assert main("info", quantized_dir) == 0
    out = capsys.readouterr().out
    assert "Quantization  gptq: bits=4, " in out
    assert "group_size=32" in out
    assert "I32 tensors" in out
    assert "Perplexity" in out


def test_info_of_other_folders(tiny_llama_dir, tmp_path, capsys, fails):
    assert main("info", tiny_llama_dir) == 0
    assert "Quantization  none" in capsys.readouterr().out
    assert "no config.json" in fails("info", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "no weight file" in fails("info", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    assert "is damaged" in fails("info", tmp_path)


def test_push_puts_the_repository_into_the_card(quantized_dir, tmp_path):
    """The Hub's address is read on import, so the push has a process of its own."""
    before = (quantized_dir / "README.md").read_text()
    with FakeHub() as hub:
        done = subprocess.run(
            [sys.executable, "-m", "hf_efficiency", "push", quantized_dir, "me/tiny-gptq4"],
            env={**os.environ, **hub.environment(tmp_path)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr
    assert "me/tiny-gptq4" in done.stdout
    files = hub.repos["me/tiny-gptq4"].files
    assert {path.name for path in quantized_dir.iterdir()} <= files.keys()
    card = files["README.md"].decode()
    assert 'from_pretrained("me/tiny-gptq4")' in card
    assert card == before.replace("path/to/this/folder", "me/tiny-gptq4")


def test_push_of_no_checkpoint(tmp_path, fails):
    assert "no config.json" in fails("push", tmp_path, "me/x")


def test_verify_finds_a_changed_weight(quantized_dir, tmp_path, capsys):
    hf_efficiency.prefer("gptq")
    model = AutoModelForCausalLM.from_pretrained(quantized_dir).eval()
    check = fresh.check_logits(model, torch.arange(3, 40))
    file = tmp_path / "check.safetensors"
    save_file(check, file)
    assert main("verify", quantized_dir, "--logits", file) == 0
    assert json.loads(capsys.readouterr().out)["identical"] is True
    check["logits"][0, 0, 0] = torch.nextafter(check["logits"][0, 0, 0], torch.tensor(9e9))
    save_file(check, file)
    assert main("verify", quantized_dir, "--logits", file) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["identical"] is False
    assert 0 < result["max_difference"] < 1e-3


def test_verify_of_bad_files(quantized_dir, tmp_path, fails):
    file = tmp_path / "check.safetensors"
    assert "does not exist" in fails("verify", quantized_dir, "--logits", file)
    file.write_bytes(b"x" * 100)
    assert "no safetensors file" in fails("verify", quantized_dir, "--logits", file)
    save_file({"ids": torch.zeros(1, 4, dtype=torch.long), "logits": torch.zeros(1, 4, 7)}, file)
    assert "of shape (1, 4, 384)" in fails("verify", quantized_dir, "--logits", file)
    assert "needs a tensor called prompt" in fails("verify", quantized_dir, "--speed")


def test_fresh_process_that_fails_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"does not run in a fresh process: .*error"):
        fresh.run_fresh(tmp_path, "float32", "cpu")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a=1", ("a", 1)), ("a-b=0.5", ("a_b", 0.5)), ("a=true", ("a", True)), ("a=fast", ("a", "fast")),
     ('d={".*q": {"bits": 8}}', ("d", {".*q": {"bits": 8}})), ("a=b=c", ("a", "b=c"))],
)  # fmt: skip
def test_assignments(text, expected):
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("argv", [[], ["melt"], ["quantize"], ["quantize", "m", "--method", "magic", "--output", "o"]])
def test_typing_errors(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert "usage: hf-efficiency" in capsys.readouterr().err


def test_interrupt_is_quiet(tmp_path, monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupted)
    assert main("info", tmp_path) == 130
    assert capsys.readouterr().err == "hf-efficiency: interrupted\n"


def test_bugs_keep_their_traceback(tmp_path, monkeypatch):
    def buggy(args):
        raise AssertionError("a bug")

    monkeypatch.setattr(info, "run", buggy)
    with pytest.raises(AssertionError, match="a bug"):
        main("info", tmp_path)


def test_traceback_on_demand(tmp_path):
    with pytest.raises(ValueError, match="no config"):
        main("info", tmp_path, "--traceback")


def test_complaint_is_one_line(tmp_path, monkeypatch, fails):
    def wordy(args):
        raise OSError("first\n  second\n\nthird")

    monkeypatch.setattr(info, "run", wordy)
    assert fails("info", tmp_path) == "first second third"


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"hf-efficiency {hf_efficiency.__version__}\n"
