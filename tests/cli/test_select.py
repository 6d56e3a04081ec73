import json

import numpy as np
import pytest
from datasets import Dataset
from safetensors.numpy import load_file

from hf_efficiency import cli


@pytest.fixture
def pool(tmp_path, texts):
    file = tmp_path / "pool.jsonl"
    strange = [" ".join(f"w{(i * j) % 13}" for j in range(40)) for i in range(1, 9)]
    rows = [{"text": text, "id": i} for i, text in enumerate([*strange, *texts[:8], texts[0]])]
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return file


@pytest.fixture
def target(tmp_path, texts):
    file = tmp_path / "target.txt"
    file.write_text("\n\n".join(texts[8:40]) + "\n")
    return file


def run(*argv):
    assert cli.main([str(argument) for argument in argv]) == 0


def test_select_writes_subset_scores_and_report(pool, target, tmp_path, capsys):
    out = tmp_path / "out"
    run("select", pool, "--strategy", "dsir", "--target", target, "--k", 8, "--output", out)
    rows = [json.loads(line) for line in (out / "subset.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    assert all(row["id"] >= 8 for row in rows)
    tensors = load_file(out / "scores.safetensors")
    assert tensors["scores"].shape == (17,)
    assert sorted(tensors["indices"].tolist()) == [row["id"] for row in rows]
    report = json.loads((out / "report.json").read_text())
    assert report["characters"]["chosen"] == sum(len(row["text"]) for row in rows)
    assert "--strategy dsir" in report["command"]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "| Rows chosen | 8 (47.1 %) |" in (out / "README.md").read_text()
    assert "8 of 17 rows" in capsys.readouterr().out


def test_select_removes_duplicates(pool, tmp_path):
    out = tmp_path / "out"
    run("select", pool, "--strategy", "minhash", "--set", "threshold=0.8", "--output", out)
    assert len((out / "subset.jsonl").read_text().splitlines()) == 16
    assert "| Duplicates removed | 1 |" in (out / "README.md").read_text()
    run("select", pool, "--strategy", "exact", "--output", out, "--overwrite")
    assert json.loads((out / "report.json").read_text())["strategy"] == "exact"


def test_select_with_a_model_resumes(pool, tiny_llama_dir, tmp_path):
    out = tmp_path / "out"
    argv = ["select", pool, "--strategy", "perplexity", "--model", tiny_llama_dir, "--fraction", 0.5]
    argv += ["--max-length", 32, "--output", out, "--dtype", "float32", "--device", "cpu"]
    run(*argv, "--resume")
    assert not (tmp_path / "out.scores").exists()
    scores = load_file(out / "scores.safetensors")["scores"]
    assert np.isfinite(scores).all()
    assert len((out / "subset.jsonl").read_text().splitlines()) == 8


def test_select_reads_lines_and_saved_datasets(tmp_path, texts):
    (tmp_path / "p.txt").write_text("\n\n".join(texts[:5]))
    run("select", tmp_path / "p.txt", "--strategy", "length", "--k", 2, "--output", tmp_path / "a")
    dataset = Dataset.from_dict({"body": texts[:5]})
    dataset.save_to_disk(tmp_path / "saved")
    argv = ["--strategy", "length", "--k", 2, "--text-column", "body"]
    run("select", tmp_path / "saved", *argv, "--output", tmp_path / "b")
    dataset.to_parquet(tmp_path / "p.parquet")
    run("select", tmp_path / "p.parquet", *argv, "--output", tmp_path / "c")
    chosen = [(tmp_path / name / "subset.jsonl").read_text() for name in "abc"]
    assert chosen[1] == chosen[2]
    assert [json.loads(line)["text"] for line in chosen[0].splitlines()] == [
        json.loads(line)["body"] for line in chosen[1].splitlines()
    ]


def test_select_lists_strategies(capsys):
    run("select", "-", "--strategy", "list")
    assert "dsir" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--strategy", "best", "--k", 1], "strategy 'best' is unknown"),
        (["--strategy", "length", "--set", "x=1", "--k", 1], "'length' has no setting 'x'"),
        (["--strategy", "length"], "'length' needs k"),
        (["--strategy", "length", "--k", 99], "k=99 is above the pool of 17 rows"),
        (["--strategy", "length", "--k", 1, "--fraction", 0.5], "--k and --fraction say the same"),
        (["--strategy", "dsir", "--k", 1], "'dsir' needs target="),
        (["--strategy", "loss", "--k", 1], "'loss' needs model="),
    ],
)
def test_bad_options(pool, tmp_path, fails, argv, message):
    assert message in fails("select", pool, *argv, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_files(pool, tmp_path, fails):
    length = ["--strategy", "length", "--k", 1]
    out = ["--output", tmp_path / "out"]
    assert "there is no file" in fails("select", tmp_path / "no.jsonl", *length, *out)
    (tmp_path / "a.csv").write_text("x")
    assert "files must end in .txt, .jsonl, .parquet" in fails("select", tmp_path / "a.csv", *length, *out)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n[1]\n')
    assert "line 2" in fails("select", tmp_path / "bad.jsonl", *length, *out)
    (tmp_path / "worse.jsonl").write_text("{\n")
    assert "is no JSON" in fails("select", tmp_path / "worse.jsonl", *length, *out)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\n")
    assert "is no UTF-8" in fails("select", tmp_path / "latin.txt", *length, *out)
    (tmp_path / "empty.txt").write_text("\n")
    assert "the dataset is empty" in fails("select", tmp_path / "empty.txt", *length, *out)
    (tmp_path / "folder").mkdir()
    assert "was not written by datasets" in fails("select", tmp_path / "folder", *length, *out)
    assert "--output is missing" in fails("select", pool, *length)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    mine = ["--output", tmp_path / "mine", "--overwrite"]
    assert "holds 'thesis.txt', which is no part of a selection" in fails("select", pool, *length, *mine)
    assert "is a file" in fails("select", pool, *length, "--output", pool)
