"""Gist tokens, and the classifier that a command trains."""

import pytest
import torch
from transformers import AutoModelForTokenClassification

from hf_efficiency import GistModel, compress_prompt
from hf_efficiency.cli import main
from hf_efficiency.generation.compression.gist import gist_mask


def test_mask_by_hand():
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1]]
    assert gist_mask(2, 1, 1).int().tolist() == expected


def test_gist_cache_says_what_the_mask_says(tiny_llama, tiny_tokens):
    gists = GistModel(tiny_llama, 3)
    prompt, rest = tiny_tokens[0, :20], tiny_tokens[1, :6]
    gist = gists.compress(prompt)
    assert gist.cache.get_seq_length() == 3
    torch.testing.assert_close(gists.logits(gist, rest), gists(prompt, rest).detach(), atol=1e-4, rtol=1e-4)


def test_training_lowers_the_loss_and_reloads(tiny_llama, tiny_tokens, tmp_path):
    torch.manual_seed(0)
    gists = GistModel(tiny_llama, 2)
    before = tiny_llama.get_input_embeddings().weight.clone()
    losses = gists.fit([(tiny_tokens[0, :12], tiny_tokens[1, :8])], epochs=20, learning_rate=0.05)
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(tiny_llama.get_input_embeddings().weight, before)
    gists.save_pretrained(tmp_path / "gist")
    again = GistModel.from_pretrained(tiny_llama, tmp_path / "gist")
    assert torch.equal(again.embeddings, gists.embeddings)
    with pytest.raises(ValueError, match="holds no gist tokens"):
        GistModel.from_pretrained(tiny_llama, tmp_path)
    with pytest.raises(ValueError, match="num_tokens is 0; it must be at least 1"):
        GistModel(tiny_llama, 0)


def test_command_trains_a_classifier(tiny_llama_dir, tiny_tokenizer, texts, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "classifier"
    text.write_text("\n\n".join(texts[:3]))
    options = ["--layers", "1", "--epochs", "2", "--output", str(out), "--dtype", "float32", "--device", "cpu"]
    assert main(["train-compressor", str(tiny_llama_dir), str(text), *options]) == 0
    model = AutoModelForTokenClassification.from_pretrained(out)
    found = compress_prompt(texts[4], ratio=0.5, method="llmlingua2", model=model, tokenizer=tiny_tokenizer)
    assert found.ratio == pytest.approx(0.5, rel=0.03)
