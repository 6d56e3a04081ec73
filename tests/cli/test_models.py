from pathlib import Path

import pytest
import torch

from hf_efficiency.cli import models

CARD = """---
base_model: org/base
license: mit
language: en
---
"""


def test_folder_with_a_card(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text(CARD)
    with models.resolve(str(tmp_path)) as source:
        assert source == models.Source(str(tmp_path), "org/base", "mit", ["en"])


@pytest.mark.parametrize("readme", [None, "# no metadata", "---\nlicense: mit\n---\n"])
def test_folder_whose_card_says_little(readme, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    with models.resolve(str(tmp_path)) as source:
        assert source.base_model is None


def test_hub_id_is_its_own_base_model_even_without_network():
    with models.resolve("org/some-model") as source:
        assert source == models.Source("org/some-model", "org/some-model")


def test_gguf_file_becomes_a_folder_for_as_long_as_it_is_needed(tmp_path, monkeypatch):
    seen = []

    def convert(file, out):
        out.mkdir()
        seen.append((file, out))
        return out

    monkeypatch.setattr(models, "convert_gguf", convert)
    with models.resolve(str(tmp_path / "m.gguf")) as source:
        assert Path(source.path).is_dir()
        assert "m.gguf expanded" in source.note
    assert seen == [(tmp_path / "m.gguf", Path(source.path))]
    assert not Path(source.path).exists()


def test_alias_of_the_demo_model(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(CARD)
    monkeypatch.setattr(models, "demo_model_path", lambda: str(tmp_path))
    monkeypatch.setattr(models, "demo_gguf_path", lambda: Path("x.gguf"))
    with models.resolve("smollm2-135m") as source:
        assert (source.path, source.license) == (str(tmp_path), "mit")
        assert "x.gguf" in source.note


def test_config_that_is_no_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json' is no JSON"):
        models.quantization_of(str(tmp_path))


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cpu:1", "cuda:x"])
def test_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=f"--device {device}: this machine has no such device"):
        models.pick_device(device)


def test_device_by_default():
    assert models.pick_device(None) == ("cuda" if torch.cuda.is_available() else "cpu")
    assert models.pick_device("cpu") == "cpu"


def test_damaged_weights(tiny_llama_dir, tmp_path, fails):
    for path in tiny_llama_dir.iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[: len(content) // 2] if path.suffix == ".safetensors" else content)
    assert fails("evaluate", tmp_path, "--window", "32")
