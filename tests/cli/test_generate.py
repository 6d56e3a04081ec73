import json
import re

import pytest

from hf_efficiency import cli
from hf_efficiency.cli.generation import read_setting
from tests import tiny


def main(*argv):
    return cli.main([str(argument) for argument in argv])


@pytest.fixture
def ask(tiny_llama_dir):
    return ["generate", tiny_llama_dir, "--prompt", "the value of the value of", "--max-new-tokens", 12]


def test_writes_the_same_with_any_draft_and_says_how_fast(ask, tmp_path, capsys):
    assert main(*ask) == 0
    plain = capsys.readouterr()
    assert "tokens/s" in plain.err
    log = tmp_path / "log.jsonl"
    settings = (
        ["--draft", "lookup", "--log", log],
        ["--draft", "self", "--k", 3, "--no-adapt"],
        ["--draft", "skip:1", "--branching", "2,1"],
        ["--cache", "paged,block_size=4", "--draft", "lookup"],
    )
    for extra in settings:
        assert main(*ask, *extra) == 0
        out = capsys.readouterr()
        assert out.out == plain.out
        assert "acceptance" in out.err
    assert set(json.loads(log.read_text())) == {"input_ids", "rejected"}
    assert main(*ask, "--temperature", 0.8, "--draft", ask[1], "--seed", 3) == 0


def test_shortens_the_prompt(tiny_llama_dir, tmp_path, capsys):
    """The question stays, a third of the text goes, and what is printed is what the shorter prompt gives."""
    (tmp_path / "prompt.txt").write_text("The key lies under the mat. " * 3 + "Rain fell on the hills all day. " * 9)
    argv = ("generate", tiny_llama_dir, "--raw", "--max-new-tokens", 4, "--dtype", "float32")
    question = ("--question", "Where is the key?")
    assert main(*argv, "--prompt-file", tmp_path / "prompt.txt", "--compress", 0.5, *question) == 0
    out, err = capsys.readouterr()
    before, after = (int(n) for n in re.search(r"prompt: (\d+) tokens, (\d+) kept", err).groups())
    assert abs(after - before / 2) <= max(1, 0.03 * before)
    assert out.strip()


def test_compares_settings(tiny_llama_dir, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one two one two\n\nthe sea\n")
    argv = ["bench-generate", tiny_llama_dir, prompts, "--setting", "draft=self k=3 adapt=false"]
    argv += ["--setting", "cache=streaming sinks=1 window=4", "--max-new-tokens", 10]
    assert main(*argv, "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png") == 0
    assert "draft=self k=3 adapt=false" in capsys.readouterr().out
    plain, drafted, small = json.loads((tmp_path / "out.json").read_text())["settings"]
    assert plain["speedup"] == plain["agreement"] == drafted["identical"] == drafted["acceptance"] == 1
    assert small["cache_bytes"] < plain["cache_bytes"]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_distils_a_draft_from_a_log(tiny_llama_dir, tmp_path, capsys):
    log, out = tmp_path / "log.jsonl", tmp_path / "draft"
    rows = [{"input_ids": list(range(3 + i, 23 + i)), "rejected": [5, 9]} for i in range(6)]
    log.write_text("\n".join(map(json.dumps, rows)))
    argv = ["distill-draft", tiny_llama_dir, log, "--output", out, "--steps", 2, "--batch-size", 2]
    assert main(*argv, "--num-layers", 1, "--rejected-only", "--dtype", "float32") == 0
    assert "expected acceptance" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 1
    assert main("generate", tiny_llama_dir, "--draft", out, "--max-new-tokens", 8) == 0
    assert main(*argv, "--draft", out, "--overwrite") == 0


def test_a_judge_without_a_ratio(fails, ask):
    assert "add --compress 0.5" in fails(*ask, "--compress-with", ask[1])


def test_bad_input(fails, ask, tiny_llama_dir, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "x"}')
    bench = ["bench-generate", tiny_llama_dir, prompts]
    assert "no JSON object with a field 'prompt'" in fails(*bench, "--setting", "draft=lookup")
    assert "at least one --setting" in fails(*bench)
    assert "--branching is of a draft" in fails(*ask, "--branching", "2,2")
    assert "--top-k and --top-p are of sampling" in fails(*ask, "--top-k", 3)
    assert "branching 'x'" in fails(*ask, "--draft", "self", "--branching", "x")
    assert "skip:10, say" in fails(*ask, "--draft", "skip:")
    assert "no cache 'nope'" in fails(*ask, "--cache", "nope")
    assert "'window' is not OPTION=VALUE" in fails(*ask, "--cache", "streaming,window")
    other = tmp_path / "other"
    tiny.build_llama(vocab_size=300).save_pretrained(other)
    tiny.build_tokenizer(["other words"], 300).save_pretrained(other)
    assert "another tokenizer than the model" in fails(*ask, "--draft", other)
    text = tmp_path / "text.txt"
    text.write_text("word " * 30)
    draft = ["distill-draft", tiny_llama_dir, text, "--output", tmp_path / "draft"]
    assert "--steps is 0" in fails(*draft, "--steps", 0)
    assert "needs a log of generate --log" in fails(*draft, "--rejected-only")
    assert "shorter than one sequence" in fails(*draft, "--seq-len", 2000)


@pytest.mark.parametrize(
    ("text", "message"),
    [("draft", "is not NAME=VALUE"), ("k=3", "names no draft"), ("draft=self bits=2", "it names none")],
)
def test_settings_that_say_nothing(text, message):
    with pytest.raises(ValueError, match=message):
        read_setting(text)
