import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_efficiency import TeacherCache, cli


def main(*argv):
    return cli.main([str(argument) for argument in argv])


@pytest.fixture
def file(tmp_path, texts):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(texts[:12]))
    return path


def test_caches_what_the_teacher_says(tiny_llama_dir, tiny_tokenizer, file, tmp_path, capsys):
    out = tmp_path / "cache"
    argv = ["cache-teacher", tiny_llama_dir, file, "--output", out, "--seq-len", 32, "--top-k", 8, "--temperature", 2]
    assert main(*argv, "--max-sequences", 6) == 0
    assert f"{out}: 6 sequences, 192 tokens" in capsys.readouterr().out
    cache = TeacherCache(out)
    cache.check_tokenizer(tiny_tokenizer)
    assert cache.temperature == 2
    ids = tiny_tokenizer(file.read_text())["input_ids"]
    assert [row["input_ids"] for row in (cache.dataset()[i] for i in range(6))] == [
        ids[i : i + 32] for i in range(0, 192, 32)
    ]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        expected = (model(torch.tensor([ids[:32]])).logits[0, :-1] / 2).log_softmax(-1).topk(8)
    rows = cache.rows(torch.tensor(ids[:32]))
    assert torch.equal(rows.ids, expected.indices)
    torch.testing.assert_close(rows.log_p, expected.values, rtol=1e-3, atol=1e-3)
    assert main(*argv, "--max-sequences", 6) == 0  # finished already


def test_documents_end_with_the_end_token(tiny_llama_dir, tiny_tokenizer, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": "one two three"}) + "\n" for _ in range(4)))
    main("cache-teacher", tiny_llama_dir, file, "--output", tmp_path / "c", "--seq-len", 8, "--top-k", 4)
    one = [*tiny_tokenizer("one two three")["input_ids"], tiny_tokenizer.eos_token_id]
    assert TeacherCache(tmp_path / "c").dataset()[0]["input_ids"] == (4 * one)[:8]


def test_bad_input(tiny_llama_dir, file, tmp_path, fails):
    def message(*argv, text=file):
        return fails("cache-teacher", tiny_llama_dir, text, "--output", tmp_path / "c", *argv)

    assert message("--top-k", 0) == "--top-k is 0; it must be at least 1"
    assert message("--seq-len", 1) == "--seq-len is 1; it must be at least 2"
    assert "shorter than one sequence of --seq-len 100000 tokens" in message("--seq-len", 100000)
    assert "top_k=384 must be below the vocabulary's 384" in message("--top-k", 384, "--seq-len", 32)
    assert "cannot read the text file" in message(text=tmp_path / "none.txt")
    (tmp_path / "bad.jsonl").write_text('{"content": "a"}\n')
    assert "line 1 of" in message(text=tmp_path / "bad.jsonl")
    assert not (tmp_path / "c").exists()
    main("cache-teacher", tiny_llama_dir, file, "--output", tmp_path / "c", "--seq-len", 32, "--max-sequences", 2)
    assert "made otherwise: data" in message("--seq-len", 32, "--max-sequences", 3)
