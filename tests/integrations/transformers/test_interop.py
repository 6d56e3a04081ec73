"""Checkpoints of other packages read by ours (`tests/fixtures/README.md`), and ours read by gptqmodel."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_efficiency import GPTQConfig, RTNConfig, prefer
from hf_efficiency.quantization.layers.affine import AffineLinear
from tests import tiny
from tests.loaders import tables_kept

FIXTURES = Path(__file__).parents[2] / "fixtures"
CHECKPOINTS = sorted(str(path.parent.relative_to(FIXTURES)) for path in FIXTURES.glob("*/*/config.json"))
# Relative error of the writers' own forward: gptqmodel in float16, AWQ in bfloat16, compressed-tensors in float32. A
# zero point that is off by one in some rows of one layer shifts the logits by 0.1.
TOLERANCE = {"gptqmodel": 3e-3, "auto-round": 1.5e-2, "llm-compressor": 1e-5}

# Runs apart: gptqmodel changes logging, threads and torch's settings, and writes logs into the working folder.
READ_WITH_GPTQMODEL = """
import sys, torch
from gptqmodel import GPTQModel
from safetensors.torch import load_file, save_file
ids = load_file(sys.argv[1])["ids"]
for folder in sys.argv[2:]:
    model = GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend="torch")
    with torch.no_grad():
        save_file({"logits": model(input_ids=ids).logits.float().contiguous()}, folder + "/theirs.safetensors")
"""


@pytest.fixture
def ours_preferred():
    """Our loader for all standard formats, whatever is installed; the registry is put back afterwards."""
    with tables_kept():
        for name in ("gptq", "awq", "compressed-tensors"):
            prefer(name)
        yield


def relative_error(logits, expected):
    return ((logits - expected).norm() / expected.norm()).item()


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def layers_of(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, AffineLinear)}


def test_the_fixtures_are_there():
    assert {name.split("-")[0] for name in CHECKPOINTS} == {"gptqmodel", "auto", "llm"}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_reads_what_others_wrote(name, ours_preferred, tmp_path):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype=torch.float32)
    assert layers_of(model)
    logits = logits_of(model, expected["input_ids"])
    tolerance = next(value for writer, value in TOLERANCE.items() if name.startswith(writer))
    assert relative_error(logits, expected["logits"]) < tolerance
    # and written back, it says the same
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(again, expected["input_ids"]), logits)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_zero_points_of_zero_in_files_of_gptqmodel(bits, ours_preferred):
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / f"gptqmodel-7.6.0/{bits}-asym", dtype=torch.float32)
    zeros = model.model.layers[0].mlp.up_proj.unpack().zeros
    # every fifth row holds no negative weight, the others do
    assert bool((zeros[::5] == 0).all())
    assert bool((zeros[1::5] > 0).all())


def test_mixed_widths_of_gptqmodel(ours_preferred):
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "gptqmodel-7.6.0/mixed", dtype=torch.float32)
    layers = layers_of(model)
    widths = {name.rpartition(".")[2]: layer.bits for name, layer in layers.items()}
    assert widths == {"q_proj": 4, "k_proj": 4, "v_proj": 4, "gate_proj": 2, "up_proj": 4, "down_proj": 8}
    assert layers["model.layers.0.mlp.down_proj"].scales.shape[0] == 2  # 96 columns in groups of 64


# Ours, for others


def quantized(folder, config):
    tiny.build_llama().save_pretrained(folder / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32, quantization_config=config)
    model.save_pretrained(folder / "ours")
    return model, folder / "ours"


def test_asymmetric_files_name_the_convention_that_gptqmodel_asks_for(tmp_path):
    _, folder = quantized(tmp_path, RTNConfig(bits=4, group_size=32))
    meta = json.loads((folder / "config.json").read_text())["quantization_config"]["meta"]
    writers = [writer.partition(":")[0] for writer in meta["quantizer"]]
    assert writers == ["hf_efficiency", "gptqmodel"]


@pytest.mark.parametrize(
    ("dynamic", "widths"),
    [
        # saved in order of the alphabet, the second of these would win
        ({".*v_proj": {"bits": 8}, ".*self_attn.*": {"bits": 2}}, {"v_proj": 8, "q_proj": 2, "up_proj": 4}),
        ({"+:.*": {"bits": 8}, "-:.*q_proj": {}}, {"v_proj": 8, "up_proj": 8}),
        ({"(?i).*V_PROJ|.*K_PROJ": {"bits": 8}, "(.*)": {"bits": 2}}, {"v_proj": 8, "k_proj": 8, "q_proj": 2}),
    ],
)
def test_overlapping_overrides_keep_their_order(tmp_path, dynamic, widths):
    model, folder = quantized(tmp_path, RTNConfig(bits=4, group_size=32, dynamic=dynamic))
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for which in (model, again):
        found = {name.rpartition(".")[2]: layer.bits for name, layer in layers_of(which).items()}
        assert {key: found[key] for key in widths} == widths
        assert ("q_proj" in found) == ("q_proj" in widths)  # skipped, where it is not named


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="gptqmodel is not installed")
def test_gptqmodel_reads_ours(tmp_path, tiny_tokens, tiny_tokenizer):
    mixed = {"-:.*layers\\.1.*down_proj": {}, ".*v_proj": {"bits": 8, "group_size": 64}, ".*self_attn.*": {"bits": 2}}
    calibration = {"calibration": tiny_tokens, "num_samples": 8, "seq_len": 32, "progress": False}
    configs = {
        "gptq-4": GPTQConfig(bits=4, group_size=32, **calibration),
        "gptq-3": GPTQConfig(bits=3, group_size=64, **calibration),  # ragged: 160 columns
        "gptq-2-sym": GPTQConfig(bits=2, group_size=32, sym=True, **calibration),
        "rtn-8": RTNConfig(bits=8, group_size=-1),
        "mixed": RTNConfig(bits=4, group_size=32, dynamic=mixed),
        "skipped": RTNConfig(bits=4, group_size=32, modules_to_not_convert=["o_proj"]),
        "v2": RTNConfig(bits=4, group_size=32, format="gptq_v2"),
        "awq": RTNConfig(bits=4, group_size=32, format="awq"),
    }
    save_file({"ids": tiny_tokens}, tmp_path / "ids.safetensors")
    logits, folders = {}, {}
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        model, folders[name] = quantized(tmp_path / name, config)
        tiny_tokenizer.save_pretrained(folders[name])
        logits[name] = logits_of(model, tiny_tokens)
    command = [
        sys.executable,
        "-c",
        READ_WITH_GPTQMODEL,
        str(tmp_path / "ids.safetensors"),
        *map(str, folders.values()),
    ]
    settings = {"GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **settings}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, folder in folders.items():
        theirs = load_file(folder / "theirs.safetensors")["logits"]
        assert relative_error(theirs, logits[name]) < 5e-3, name
