"""Kernel projects through the `kernels` library: built, loaded, pushed to a Hub, and put into a model's layers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels import get_local_kernel, kernelize, use_kernel_mapping
from kernels._rust import Build
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_efficiency import RTNConfig
from hf_efficiency.cli import main
from hf_efficiency.integrations import kernels_hub
from tests.fake_hub import FakeHub

ROOT = Path(__file__).parent.parent.parent
PROJECTS = sorted(kernels_hub.projects())


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """All projects, built by the command."""
    folder = tmp_path_factory.mktemp("kernels")
    assert main(["kernels", "build", "--output", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", PROJECTS)
def test_build_passes_the_check_and_loads(builds, name):
    project = kernels_hub.find_project(name)
    Build.open(ROOT / "kernels" / name)
    found = kernels_hub.check(builds / name)
    assert sorted(found) == sorted(f"torch-{backend}" for backend in project.backends)
    module = get_local_kernel(builds / name, backend="cpu")
    assert set(module.__all__) <= set(dir(module))
    metadata = json.loads((builds / name / "build/torch-cuda/metadata.json").read_text())
    assert metadata["name"] == name.replace("_", "-")
    assert metadata["backend"] == {"type": "cuda"}


def test_build_holds_files_and_no_links(builds):
    """What is a link in a checkout must arrive as a file, or the project does not stand alone."""
    launch = builds / "decoder_layers/build/torch-cpu/_launch.py"
    assert launch.is_file()
    assert not launch.is_symlink()
    assert launch.read_text() == (ROOT / "kernels/launch.py").read_text()


def test_copies_of_one_kernel_live_side_by_side(builds):
    """Loaded from a build and from the package: operators of two namespaces, one result."""
    from hf_efficiency.kernels import decoder_layers

    loaded = get_local_kernel(builds / "decoder_layers", backend="cpu")
    x, w = torch.randn(2, 8), torch.randn(8)
    assert torch.equal(loaded.rms_norm(x, w), decoder_layers.rms_norm(x, w))


def test_check_names_what_is_wrong(builds, tmp_path):
    with pytest.raises(ValueError, match=r"build\.toml"):
        kernels_hub.check(tmp_path)
    kernels_hub.build(kernels_hub.find_project("decoder-layers"), tmp_path / "broken")
    broken = tmp_path / "broken/build/torch-cpu"
    (broken / "metadata.json").write_text("{}")
    with pytest.raises(ValueError, match=r"torch-cpu/metadata\.json"):
        kernels_hub.check(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"no kernel 'fast'.*decoder-layers"):
        kernels_hub.find_project("fast")


LOAD_FROM_HUB = """
import torch
from kernels import get_kernel
kernel = get_kernel("tester/decoder-layers", version=1, backend="cpu", trust_remote_code=True)
x = torch.arange(8.0)[None]
print(kernel.rms_norm(x, torch.ones(8), 0.0).square().mean().item())
print(kernel.layers.RMSNorm.__name__)
"""


def test_push_and_get_kernel_back(builds, tmp_path):
    with FakeHub() as hub:
        env = {**os.environ, **hub.environment(tmp_path)}
        # kernels 0.17.2 ends its user agent in a blank where telemetry is off, which httpx refuses
        del env["HF_HUB_DISABLE_TELEMETRY"]
        push = "from hf_efficiency.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
        words = ["kernels", "push", str(builds / "decoder_layers"), "tester/decoder-layers"]
        done = subprocess.run([sys.executable, "-c", push, *words], env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "tester/decoder-layers/tree/v1" in done.stdout
        assert {"README.md", "build.toml"} <= hub.repos["tester/decoder-layers"].files.keys()
        run = subprocess.run(
            [sys.executable, "-c", LOAD_FROM_HUB], env=env, cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        value, layer = run.stdout.split()
        assert float(value) == pytest.approx(1.0)
        assert layer == "RMSNorm"


def test_local_kernels_variable_takes_the_build(builds, tmp_path):
    script = LOAD_FROM_HUB.replace("tester/decoder-layers", "hf-efficiency/decoder-layers")
    env = {**os.environ, "LOCAL_KERNELS": f"hf-efficiency/decoder-layers={builds / 'decoder_layers'}"}
    run = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[1] == "RMSNorm"


def replaced(model):
    """Class names of the modules whose forward is no longer their class's own."""
    return {type(m).__name__ for m in model.modules() if "forward" in vars(m)}


@pytest.mark.parametrize("config", [None, RTNConfig(bits=4, group_size=32)], ids=["dense", "rtn"])
def test_whole_layers_of_a_stock_model(tiny_llama_dir, tiny_tokens, config, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels_hub.constants, "HF_HOME", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, quantization_config=config).eval()
    expected = model(tiny_tokens).logits
    kernels_hub.kernelize_layers(model)
    assert replaced(model) >= {"LlamaRMSNorm", "LlamaMLP"}
    assert torch.allclose(model(tiny_tokens).logits, expected, atol=1e-4)
    with use_kernel_mapping({}, inherit_mapping=False):
        kernelize(model, mode=kernels_hub.Mode.INFERENCE, device="cpu")
    assert torch.equal(model(tiny_tokens).logits, expected)


USE_KERNELS = """
import sys, torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP
from hf_efficiency.integrations.transformers.layer_kernels import register_layer_kernels
register_layer_kernels(LlamaMLP, backends=("cpu",))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], use_kernels=True)
print(sorted({type(m).__name__ for m in model.modules() if "forward" in vars(m)}))
plain = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(12)[None]
print((model(ids).logits - plain(ids).logits).abs().max().item() < 1e-4)
"""


def test_use_kernels_of_from_pretrained(tiny_llama_dir, tmp_path):
    env = {**os.environ, "HF_HOME": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", USE_KERNELS, str(tiny_llama_dir)]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "LlamaMLP" in run.stdout
    assert "LlamaRMSNorm" in run.stdout
    assert run.stdout.split()[-1] == "True"


def test_only_gated_mlps_are_opened():
    with pytest.raises(TypeError, match="no class of torch modules"):
        kernels_hub.open_gated_mlps("LlamaMLP")
    kernels_hub.open_gated_mlps(LlamaMLP)
    assert LlamaMLP.kernel_layer_name == "GatedMLP"
