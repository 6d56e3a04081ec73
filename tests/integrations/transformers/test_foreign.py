"""Checkpoints put together word by word from the formats' definitions, as other programs write them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_efficiency.quantization.layers.affine import AffineLinear
from tests import tiny

pytestmark = pytest.mark.usefixtures("our_loaders")

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(values, bits=4):
    """Rows of codes to rows of int32 words, the first code in the lowest bits."""
    per_word = 32 // bits
    rows = []
    for row in values.tolist():
        parts = [row[i : i + per_word] for i in range(0, len(row), per_word)]
        unsigned = [sum(code << (bits * k) for k, code in enumerate(part)) for part in parts]
        rows.append([word - (1 << 32) if word >= 1 << 31 else word for word in unsigned])
    return torch.tensor(rows, dtype=torch.int32)


def interleaved(values):
    """Columns in the order in which AWQ's words hold them."""
    rows = values.shape[0]
    return values.view(rows, -1, 8)[:, :, list(AWQ_ORDER)].reshape(rows, -1)


class Maker:
    """A tiny Llama with random codes in every layer: its plain form, and the tensors of a checkpoint.

    Shapes: codes (d_out, d_in), scales and zeros (d_out, groups), g_idx (d_in,).
    """

    def __init__(self, bits=4, permuted=False, symmetric=False):
        self.bits, self.generator = bits, torch.Generator().manual_seed(0)
        self.model = tiny.build_llama()
        self.layers = {}
        for name, linear in self.model.model.layers.named_modules():
            if isinstance(linear, nn.Linear):
                self.layers[f"model.layers.{name}"] = self._random(linear, permuted, symmetric)

    def _random(self, linear, permuted, symmetric):
        d_out, d_in = linear.weight.shape
        groups, top = d_in // GROUP, (1 << self.bits) - 1
        codes = torch.randint(0, top + 1, (d_out, d_in), generator=self.generator)
        zeros = torch.randint(1, top + 1, (d_out, groups), generator=self.generator)
        if symmetric:
            zeros[:] = 1 << (self.bits - 1)
        scales = (torch.rand(d_out, groups, generator=self.generator) * 0.02 + 0.01).bfloat16().half()
        g_idx = torch.arange(d_in) // GROUP
        if permuted:
            g_idx = g_idx[torch.randperm(d_in, generator=self.generator)]
        linear.weight.data = scales.float()[:, g_idx] * (codes - zeros[:, g_idx])
        return codes, scales, zeros, g_idx

    def save(self, folder, quantization_config, pack):
        """Writes the checkpoint: `pack` makes the tensors of a layer."""
        tensors = {k: v for k, v in self.model.state_dict().items() if k.removesuffix(".weight") not in self.layers}
        for name, layer in self.layers.items():
            tensors |= {f"{name}.{key}": value.contiguous() for key, value in pack(*layer).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = {**self.model.config.to_dict(), "dtype": "float32", "quantization_config": quantization_config}
        config["architectures"] = ["LlamaForCausalLM"]
        (folder / "config.json").write_text(json.dumps(config, default=str))


def gptq(offset, bits=4, g_idx=True):
    def pack(codes, scales, zeros, index):
        tensors = {
            "qweight": words(codes, bits).T,  # packed along d_in
            "qzeros": words(zeros.T - offset, bits),  # packed along d_out
            "scales": scales.T,
        }
        return {**tensors, "g_idx": index.int()} if g_idx else tensors

    return pack


def awq(codes, scales, zeros, index):
    return {"qweight": words(interleaved(codes.T)), "qzeros": words(interleaved(zeros.T)), "scales": scales.T}


def pack_quantized(symmetric):
    def pack(codes, scales, zeros, index):
        tensors = {
            "weight_packed": words(codes),
            "weight_scale": scales.bfloat16(),
            "weight_shape": torch.tensor(codes.shape),
        }
        return tensors if symmetric else {**tensors, "weight_zero_point": words(zeros.T).T}

    return pack


GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}


def pack_quantized_config(symmetric):
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": GROUP}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


CASES = {
    "gptq": ({}, GPTQ_CONFIG | {"checkpoint_format": "gptq"}, gptq(1)),
    "gptq, no checkpoint_format": ({}, GPTQ_CONFIG, gptq(1)),
    "gptq, no g_idx": ({}, GPTQ_CONFIG, gptq(1, g_idx=False)),
    "gptq, permuted": ({"permuted": True}, GPTQ_CONFIG | {"desc_act": True}, gptq(1)),
    "gptq_v2": ({}, GPTQ_CONFIG | {"checkpoint_format": "gptq_v2"}, gptq(0)),
    "gptq, 8 bits": ({"bits": 8}, GPTQ_CONFIG | {"bits": 8}, gptq(1, bits=8)),
    "gptq, 2 bits": ({"bits": 2}, GPTQ_CONFIG | {"bits": 2}, gptq(1, bits=2)),
    "awq": ({}, AWQ_CONFIG, awq),
    "awq, older keys": ({}, {k: v for k, v in AWQ_CONFIG.items() if k != "version"}, awq),
    "pack-quantized": ({}, pack_quantized_config(False), pack_quantized(False)),
    "pack-quantized, symmetric": ({"symmetric": True}, pack_quantized_config(True), pack_quantized(True)),
}


@pytest.mark.parametrize("case", CASES)
def test_reads_what_the_format_says(case, tmp_path, tiny_tokens):
    settings, config, pack = CASES[case]
    maker = Maker(**settings)
    maker.save(tmp_path, config, pack)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = {name: module for name, module in model.named_modules() if isinstance(module, AffineLinear)}
    assert found.keys() == maker.layers.keys()
    for name, layer in found.items():
        assert torch.equal(layer.dequantize(), maker.model.get_submodule(name).weight)
    with torch.no_grad():
        expected, logits = maker.model(tiny_tokens).logits, model(tiny_tokens).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        # In bfloat16 the CPU's int4 product takes over.
        half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert (half(tiny_tokens).logits.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("case", CASES)
def test_saves_what_it_read(case, tmp_path, tiny_tokens):
    settings, config, pack = CASES[case]
    Maker(**settings).save(tmp_path, config, pack)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(tiny_tokens).logits, model(tiny_tokens).logits)
    stored = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == config["quant_method"]
    # Others look at g_idx only where this is set.
    assert stored.get("desc_act", False) == config.get("desc_act", False)
