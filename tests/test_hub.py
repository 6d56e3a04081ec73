"""Push to a Hub and load back: model, tokenizer and card, through the host library's own calls."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from hf_efficiency import AWQConfig, GPTQConfig, NF4Config, QuIPSharpConfig, RTNConfig
from tests.fake_hub import FakeHub

ROOT = Path(__file__).parent.parent

# The Hub's address is read when huggingface_hub is imported, so the push runs in a process of its own.
PUSH_AND_LOAD = """
import sys
import torch
import hf_efficiency
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "A model that went to the Hub and came back."

for standard in ("gptq", "awq", "bitsandbytes"):  # whatever else is installed, our loaders are meant
    hf_efficiency.prefer(standard)

def linear_types(model):
    return [type(module).__name__ for module in model.modules() if isinstance(module, torch.nn.Linear)]

for folder, repo in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.push_to_hub(repo)
    tokenizer.push_to_hub(repo)
    ModelCard.load(f"{folder}/README.md").push_to_hub(repo)

    again, tokenizer_again = AutoModelForCausalLM.from_pretrained(repo), AutoTokenizer.from_pretrained(repo)
    batch, batch_again = tokenizer(TEXT, return_tensors="pt"), tokenizer_again(TEXT, return_tensors="pt")
    with torch.no_grad():
        same = model(**batch).logits.equal(again(**batch_again).logits)
    print(repo, "same" if same and linear_types(model) == linear_types(again) else "CHANGED", *set(linear_types(again)))
"""

CARD = """---
license: apache-2.0
library_name: transformers
---

# A tiny model
"""

CALIBRATION = {"num_samples": 4, "seq_len": 32, "progress": False}
# Method's name -> its config (None: the dense model), and the type of the layers that the loaded model then has.
METHODS = {
    "dense": (None, "Linear"),
    "rtn": (RTNConfig(bits=3, group_size=32), "AffineLinear"),
    "gptq": (GPTQConfig(bits=4, group_size=32, **CALIBRATION), "AffineLinear"),
    "awq": (AWQConfig(bits=4, group_size=32, **CALIBRATION), "AffineLinear"),
    "nf4": (NF4Config(), "LUTLinear"),
    "quip-sharp": (QuIPSharpConfig(bits=2, **CALIBRATION), "LatticeLinear"),
}


def run_against(hub, home, script, *arguments):
    """Runs `script` in a process that takes `hub` for the Hub and keeps its cache in `home`."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, **hub.environment(home)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, tiny_llama_dir, tiny_tokenizer):
    """All methods pushed to one Hub and loaded back in one process: (hub, folders pushed, lines printed)."""
    base = tmp_path_factory.mktemp("hub")
    arguments = []
    for method, (config, _) in METHODS.items():
        folder = base / method
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, quantization_config=config)
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(CARD)
        arguments += [folder, f"tester/tiny-{method}"]
    with FakeHub() as hub:
        done = run_against(hub, base / "home", PUSH_AND_LOAD, *arguments)
        assert done.returncode == 0, done.stderr
        yield hub, base, {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}


@pytest.mark.parametrize("method", METHODS)
def test_loads_back_the_same(pushed, method):
    _, _, lines = pushed
    verdict, *types = lines[f"tester/tiny-{method}"]
    assert verdict == "same"
    assert METHODS[method][1] in types


@pytest.mark.parametrize("method", METHODS)
def test_hub_holds_what_was_saved(pushed, method):
    hub, base, _ = pushed
    stored = hub.repos[f"tester/tiny-{method}"].files
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= stored.keys()
    assert stored["README.md"].decode().rstrip() == CARD.rstrip()
    assert json.loads(stored["config.json"]) == json.loads((base / method / "config.json").read_text())
    saved, expected = load(stored["model.safetensors"]), load((base / method / "model.safetensors").read_bytes())
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_command_reads_from_the_hub_and_pushes_to_it(pushed, tmp_path):
    """MODEL may be a Hub id; `--push-to-hub` uploads the checkpoint with its card, report and plot."""
    hub, base, _ = pushed
    out = tmp_path / "out"
    command = "from hf_efficiency.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    words = "quantize tester/tiny-dense --method rtn --bits 4 --group-size 32 --window 32 --max-windows 2 --push-to-hub"
    done = run_against(hub, base / "home", command, *words.split(), "tester/tiny-by-command", "--output", out)
    assert done.returncode == 0, done.stderr
    stored = hub.repos["tester/tiny-by-command"].files
    assert stored == {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {"README.md", "report.json", "config.json", "model.safetensors", "tokenizer.json"} <= stored.keys()
    assert ModelCard(stored["README.md"].decode()).data.base_model == "tester/tiny-dense"
