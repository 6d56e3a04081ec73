"""`hf-efficiency finetune` on the tiny Llama."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_efficiency import NF4Config, cli
from hf_efficiency.cli import finetune_training as training
from hf_efficiency.cli.arguments import build_parser
from hf_efficiency.cli.finetune import _prepare
from hf_efficiency.cli.finetune_data import read_data, turns
from hf_efficiency.cli.publish import upload
from tests.loaders import tables_kept

ROOT = Path(__file__).parent.parent.parent
QUICK = ["--seq-len", 32, "--batch-size", 4, "--learning-rate", 0.02, "--schedule", "constant", "--eval-rows", 4]
CHATML = (
    "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def files(tmp_path_factory, texts):
    """A text, chats of two turns each, and prompts with completions."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "prose.txt").write_text("\n".join(texts))
    chats = [
        {"messages": [{"role": role, "content": text[i : i + 12]} for i, role in enumerate(("user", "assistant") * 2)]}
        for text in texts[:24]
    ]
    pairs = [{"prompt": text[:20], "completion": text[20:40]} for text in texts[:24]]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": text[:30]}) for text in texts[:24]))
    (folder / "marked.jinja").write_text(CHATML)
    (folder / "unmarked.jinja").write_text(UNMARKED)
    return folder


@pytest.fixture
def tune(tiny_llama_dir, files, tmp_path):
    """Runs the command; returns the output folder."""

    def run(*argv, data="prose.txt", out="out", status=0):
        arguments = ["finetune", tiny_llama_dir, "--data", files / data, "--output", tmp_path / out, *QUICK, *argv]
        with tables_kept():
            assert cli.main([str(argument) for argument in arguments]) == status
        return tmp_path / out

    return run


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_trains_saves_and_reports(tune, tiny_llama_dir, capsys, texts):
    out = tune("--quantize", "nf4", "--quantize-set", "block_size=32", "--max-steps", 12, "--r", 4, "--alpha", 8)
    report = report_of(out)
    assert len(report["losses"]) == 12
    assert report["loss_after"] < report["loss_before"]
    shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 160), (64, 160), (160, 64)]
    assert report["trainable_parameters"] == 2 * sum(4 * (d_in + d_out) for d_in, d_out in shapes)
    assert report["optimizer_bytes"] >= 8 * report["trainable_parameters"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not out.with_name("out.resume").exists()
    data = ModelCard.load(out / "README.md").data.to_dict()
    assert data["library_name"] == "peft"
    measured = data["model-index"][0]["results"][0]["metrics"][0]["value"]
    assert measured == pytest.approx(math.exp(report["loss_after"]), abs=1e-4)
    assert "Held-out perplexity after" in capsys.readouterr().out

    # What the card says to type gives the model that was measured.
    card = (out / "README.md").read_text()
    assert "quantization_config=hf_efficiency.NF4Config(block_size=32)" in card
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, quantization_config=NF4Config(block_size=32))
    model = PeftModel.from_pretrained(base, out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    held_out = "\n".join(texts)
    held_out = held_out[held_out.find("\n", int(0.95 * len(held_out))) + 1 :]
    ids = tokenizer(held_out + tokenizer.eos_token, return_tensors="pt").input_ids[0].split(32)[:4]
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    assert sum(losses) / 4 == pytest.approx(report["loss_after"], rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("lora", ["--dtype", "bfloat16", "--quantize", "rtn"]),
        ("vera", ["--r", 8]),
        ("galore", ["--r", 8, "--set", "update_proj_gap=3"]),
        ("dora", ["--targets", "q_proj,v_proj"]),
        ("ia3", []),
        ("prefix", ["--set", "num_virtual_tokens=4"]),
        ("dvora", ["--r", 8]),
        ("adalora", ["--r", 2, "--set", "tinit=1", "--set", "tfinal=1"]),
    ],
)
def test_types_by_name(kind, more, tune):
    out = tune("--peft", kind, "--max-steps", 6, "--learning-rate", 0.05, *more)
    report = report_of(out)
    if kind == "prefix":  # it starts from noise
        assert sum(report["losses"][-2:]) < sum(report["losses"][:2])
    else:
        assert report["loss_after"] < report["loss_before"]
    if kind == "adalora":  # the budget is really allocated: rank 2 a matrix
        pattern = json.loads((out / "adapter_config.json").read_text())["rank_pattern"]
        assert sum(sum(kept) for kept in pattern.values()) == 2 * len(pattern)


def build(files, tmp_path, tiny_llama_dir, data, *argv):
    """The trainer of a command line, its data ready."""
    argv = ["finetune", tiny_llama_dir, "--data", files / data, "--output", tmp_path / "never", *QUICK, *argv]
    args = build_parser().parse_args([str(argument) for argument in argv])
    args.argv = []
    job = _prepare(args)
    from hf_efficiency.cli.finetune import _model
    from hf_efficiency.cli.finetune_data import set_chat_template
    from hf_efficiency.cli.models import Source

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    set_chat_template(tokenizer, job.data, args.chat_template)
    with tables_kept():
        model, _ = _model(job, Source(str(tiny_llama_dir)))
    return training.build_trainer(
        args, model, tokenizer, job.data, "cpu", bf16=False, packing=job.packing, callbacks=[]
    )


@pytest.mark.parametrize("template", ["marked", "unmarked"])
def test_loss_is_on_what_the_assistant_says(template, files, tmp_path, tiny_llama_dir):
    argv = ["--chat-template", files / f"{template}.jinja", "--no-packing", "--seq-len", 128]
    trainer = build(files, tmp_path, tiny_llama_dir, "chat.jsonl", *argv)
    rows = [json.loads(line)["messages"] for line in (files / "chat.jsonl").read_text().splitlines()]
    learned = []
    for row in trainer.train_dataset:
        kept = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        learned.append(trainer.processing_class.decode(kept))
    said = [[m["content"] + "</s>" for m in row if m["role"] == "assistant"] for row in rows[:23]]
    if template == "marked":
        assert learned == ["".join(parts) for parts in said]
    else:  # a row for each turn
        assert learned == [part for parts in said for part in parts]
    everything = build(files, tmp_path, tiny_llama_dir, "chat.jsonl", *argv, "--loss-on", "all")
    assert everything.train_dataset[0]["labels"] == everything.train_dataset[0]["input_ids"]


def test_loss_is_on_completions(files, tmp_path, tiny_llama_dir):
    trainer = build(files, tmp_path, tiny_llama_dir, "pairs.jsonl", "--no-packing", "--seq-len", 64)
    first = json.loads((files / "pairs.jsonl").read_text().splitlines()[0])
    row = trainer.train_dataset[0]
    kept = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    text = trainer.processing_class.decode(kept)
    assert text.endswith("<eos>")
    assert first["completion"].endswith(text.removesuffix("<eos>"))


def test_packed_rows_do_not_see_each_other(files, tmp_path, tiny_llama_dir):
    """The loss over all rows is the same, packed or padded."""
    losses = []
    for argv in (["--no-packing"], ["--packing"]):
        trainer = build(files, tmp_path, tiny_llama_dir, "rows.jsonl", *argv, "--eval-data", files / "rows.jsonl")
        lengths = [len(row) for row in trainer.eval_dataset["input_ids"]]
        losses.append(training.held_out_loss(trainer, 100))
    assert len(lengths) < 24
    assert losses[0][1] == losses[1][1] > 0
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_killed_run_resumes_to_the_same_adapter(kind, tune, monkeypatch, fails, files, tiny_llama_dir, tmp_path):
    argv = ["--peft", kind, "--max-steps", 5, "--save-steps", 2, "--schedule", "cosine"]
    whole = tune(*argv, out="whole")
    calls = training.Progress.on_log

    def killed(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt
        return calls(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training.Progress, "on_log", killed)
        out = tune(*argv, status=130)
    assert not out.exists()
    (out.with_name("out.resume") / "checkpoint-4").mkdir()  # what a kill while saving leaves
    if kind == "lora":
        command = ["finetune", tiny_llama_dir, "--data", files / "prose.txt", "--output", out, *QUICK, *argv]
        assert "an interrupted run lies in" in fails(*command)
        assert "had learning_rate 0.02, now it is 0.5" in fails(*command, "--resume", "--learning-rate", 0.5)
    tune(*argv, "--resume")
    assert report_of(out)["losses"] == report_of(whole)["losses"]
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, out))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tune, tiny_llama_dir, files, tmp_path):
    argv = ["--quantize", "nf4", "--max-steps", "3"]
    one = report_of(tune(*argv, out="one"))["losses"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command += ["-m", "hf_efficiency", "finetune", tiny_llama_dir, "--data", files / "prose.txt", *QUICK, *argv]
    done = subprocess.run(
        [*map(str, command), "--output", str(tmp_path / "two"), "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = report_of(tmp_path / "two")
    assert two["context"]["processes"] == 2
    assert two["losses"] == pytest.approx(one, rel=1e-5)


def test_rounds_of_small_batches_are_one_batch(tune):
    """Rows of different lengths: a mean over tokens, not over rounds."""
    argv = ["--max-steps", 3, "--no-packing"]
    losses = [
        report_of(tune(*argv, "--micro-batch", size, data="pairs.jsonl", out=f"of{size}"))["losses"] for size in (4, 1)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_eight_bit_optimizer(tune):
    report = report_of(tune("--optimizer", "adamw-8bit", "--max-steps", 2, "--r", 64))
    assert report["optimizer_bytes"] < 3 * report["trainable_parameters"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--quantize", "gptq"],
            "it calibrates, and the adapter needs its very base again. Run hf-efficiency quantize",
        ),
        (["--quantize", "nf5"], "choose one of nf4, rtn"),
        (
            ["--quantize", "nf4", "--quantize-set", "bits=3"],
            "nf4 has no such field; it has block_size, double_quant, modules_to",
        ),
        (["--quantize-set", "bits=3"], "needs --quantize METHOD"),
        (["--peft", "lroa"], "no such type; did you mean"),
        (["--peft", "prompt", "--r", "4"], "the type prompt has no such option"),
        (["--peft", "prompt", "--packing"], "not before each row in it"),
        (["--peft", "prefix", "--gradient-checkpointing"], "keeps its prefix in the cache"),
        (["--set", "lora_dropuot=0.1"], "no such field; did you mean lora_dropout"),
        (["--batch-size", "4", "--micro-batch", "3"], "4 is no multiple of 1 processes of 3 sequences"),
        (["--seq-len", "4096"], "the model reads at most 512"),
        (["--seq-len", "0"], "--seq-len 0: it must be at least 1"),
        (["--learning-rate", "0"], "must be above 0"),
        (["--optimizer", "paged-adamw-8bit"], "paging moves states off a GPU"),
        (["--peft", "galore", "--optimizer", "adamw"], "the type galore brings its own"),
        (["--chat-template", "x"], "the data hold no messages"),
        (["--eval-data", "chat.jsonl"], "holds chat rows, --data "),
    ],
)
def test_bad_arguments(argv, message, fails, tiny_llama_dir, files, tmp_path):
    argv = [files / a if a == "chat.jsonl" else a for a in argv]
    command = [
        "finetune",
        tiny_llama_dir,
        "--data",
        files / "prose.txt",
        "--output",
        tmp_path / "out",
        "--device",
        "cpu",
    ]
    with tables_kept():
        assert message in fails(*command, *argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "line 1 is no JSON"),
        ('{"texts": "a"}', "line 1 is no row: write"),
        ('{"text": "a"}\n{"prompt": "a", "completion": "b"}', "line 1 is a text row and line 2 a completion row"),
        ('{"messages": [{"role": "user"}]}', 'line 1: messages must be a list of {"role": ..., "content": ...}'),
        ('{"messages": [{"role": "user", "content": "a"}]}', "nothing that the assistant says"),
        ('{"prompt": "a", "completion": [1]}', "must both be text that is not empty, or both lists of messages"),
        ('{"text": "a"}', "has one row only"),
        ("", "is empty"),
    ],
)
def test_bad_data(content, message, tmp_path):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r".") as error:
        read_data(str(tmp_path / "d.jsonl"), None)
    assert message in str(error.value)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "d.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"ends in '.csv': give a .txt file, or a .jsonl file"):
        read_data(str(tmp_path / "d.csv"), None)


def test_chats_need_a_template(fails, tiny_llama_dir, files, tmp_path):
    command = ["finetune", tiny_llama_dir, "--data", files / "chat.jsonl", "--output", tmp_path / "out"]
    assert "has no chat template: choose a model that was trained on chats" in fails(*command)


def test_turns():
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = turns([{"messages": [user, assistant, user, assistant]}, {"messages": [assistant, user]}])
    assert rows == [
        {"prompt": [user], "completion": [assistant]},
        {"prompt": [user, assistant, user], "completion": [assistant]},
    ]


def test_push_of_an_adapter(tmp_path, monkeypatch):
    """The card then names the repository as the place to load from."""
    sent = {}

    class Hub:
        def create_repo(self, repo, **kwargs):
            return SimpleNamespace(repo_id=repo)

        def upload_folder(self, **kwargs):
            sent.update(kwargs)
            return SimpleNamespace(repo_url="https://hub/me/adapter")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "README.md").write_text('PeftModel.from_pretrained(base, "path/to/this/folder")')
    assert upload(tmp_path, "me/adapter", private=True) == "https://hub/me/adapter"
    assert (tmp_path / "README.md").read_text() == 'PeftModel.from_pretrained(base, "me/adapter")'
    assert sent["commit_message"] == "Upload an adapter trained by hf_efficiency"


def test_missing_library_is_named(fails, monkeypatch, tiny_llama_dir, files, tmp_path):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "trl" else find(name, *a))
    command = ["finetune", tiny_llama_dir, "--data", files / "prose.txt", "--output", tmp_path / "out"]
    assert "finetune needs trl: pip install 'hf_efficiency[peft,trl]'" in fails(*command)
