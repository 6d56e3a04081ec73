"""bitsandbytes' checkpoint names through transformers, with the smallest quantizer that uses them.

The quantizer of the package has more to do; this one holds the calls that `bnb_format` is made for, and nothing else.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers import auto as registry
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_efficiency.integrations.transformers.bnb_format import (
    bnb_weight_conversions,
    from_bnb_config,
    read_quant_states,
    to_bnb_config,
    written_here,
)
from hf_efficiency.quantization.layers.lut import LUTLinear
from hf_efficiency.quantization.nf4 import NF4
from tests import tiny

NAMES = {"weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
         "weight.quant_state.bitsandbytes__nf4"}  # fmt: skip


class _Config(QuantizationConfigMixin):
    def __init__(self, **arguments):
        self.quant_method = "test_nf4"
        arguments.pop("modules_to_not_convert", None)
        self.method = NF4(**arguments)
        self.compute_dtype = torch.float32

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if not written_here(config_dict) and cls.stock is not None:
            return cls.stock.from_dict(config_dict, **kwargs)
        return cls(**from_bnb_config(config_dict))

    stock = None

    def to_dict(self):
        return to_bnb_config(self.method, self.compute_dtype)


class _Quantize(ConversionOps):
    def __init__(self, method):
        self.method = method

    def convert(self, input_dict, *, full_layer_name, model, **kwargs):
        ((name, values),) = input_dict.items()
        layer = model.get_submodule(name.removesuffix(".weight"))
        target = self.method.empty_layer(name, layer.in_features, layer.out_features, compute_dtype=layer.compute_dtype)
        weight = values[0] if isinstance(values, list) else values
        self.method.quantize_weight(name, weight.T if layer.conv1d else weight, target)
        del layer._parameters["weight"]
        layer.register_buffer("weight", target.weight)
        # Returned and not set here: transformers marks them as initialized, and GPT-2 initializes what is not marked.
        return {name.removesuffix("weight") + key: value for key, value in target.named_buffers()}


class _Quantizer(HfQuantizer):
    is_trainable = property(lambda self: True)

    def is_serializable(self):
        return True

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        config = self.quantization_config
        config.compute_dtype = dtype = torch.get_default_dtype()
        skip = self.get_modules_to_not_convert(model, None, None)
        for name, module in list(model.named_modules()):
            if not isinstance(module, nn.Linear | Conv1D) or name in skip:
                continue
            conv1d = isinstance(module, Conv1D)
            size = (module.nx, module.nf) if conv1d else (module.in_features, module.out_features)
            bias = module.bias is not None
            layer = config.method.empty_layer(name, *size, bias=bias, compute_dtype=dtype, device="meta", conv1d=conv1d)
            if not self.pre_quantized:  # the dense weight arrives under the name of the packed one
                del layer._buffers["weight"]
                layer.weight = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"))
            model.set_submodule(name, layer)
        if self.pre_quantized:
            layers = {name: module for name, module in model.named_modules() if isinstance(module, LUTLinear)}
            read_quant_states(layers, checkpoint_files, model.base_model_prefix)

    def param_needs_quantization(self, model, param_name, **kwargs):
        name, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(name), LUTLinear) and not self.pre_quantized

    def get_quantize_ops(self):
        return _Quantize(self.quantization_config.method)

    def get_weight_conversions(self):
        return bnb_weight_conversions(self.quantization_config.method.quant_type)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """Our reader in place of the stock config; files of others go to the stock loader unless a test says otherwise."""
    registered = registry.AUTO_QUANTIZATION_CONFIG_MAPPING["bitsandbytes_4bit"]
    monkeypatch.setattr(_Config, "stock", getattr(registered, "stock", registered))
    monkeypatch.setitem(registry.AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes_4bit", _Config)
    monkeypatch.setitem(registry.AUTO_QUANTIZATION_CONFIG_MAPPING, "test_nf4", _Config)
    monkeypatch.setitem(registry.AUTO_QUANTIZER_MAPPING, "test_nf4", _Quantizer)


def _load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def _logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def _dense(folder: Path, tied: bool = False) -> Path:
    tiny.build_llama(tie_word_embeddings=tied, intermediate_size=128).save_pretrained(folder)
    return folder


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
def test_reload_and_save_again(tmp_path, tiny_tokens, double_quant, tied, dtype):
    """Names are bitsandbytes'; the reload gives the same logits to the bit, and saved again it gives the same file."""
    folder = _dense(tmp_path / "dense", tied)
    config = _Config(block_size=32, double_quant=double_quant)
    model = _load(folder, quantization_config=config, dtype=dtype)
    model.save_pretrained(tmp_path / "one")
    stored = _tensors(tmp_path / "one")
    prefix = "model.layers.1.mlp.down_proj."
    names = {k.removeprefix(prefix) for k in stored if k.startswith(prefix)}
    assert names == (NAMES if double_quant else {n for n in NAMES if "nested" not in n})

    again = _load(tmp_path / "one", dtype=dtype)
    assert isinstance(again.model.layers[0].mlp.up_proj, LUTLinear)
    assert again.model.layers[0].mlp.up_proj.block_size == 32
    assert torch.equal(_logits(again, tiny_tokens), _logits(model, tiny_tokens))

    again.save_pretrained(tmp_path / "two")
    resaved = _tensors(tmp_path / "two")
    assert resaved.keys() == stored.keys()
    assert all(torch.equal(resaved[k], stored[k]) and resaved[k].dtype == stored[k].dtype for k in stored)
    first, second = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("one", "two"))
    assert first == second
    assert first["quantization_config"]["bnb_4bit_compute_dtype"] == str(dtype).removeprefix("torch.")
    sharded = tmp_path / "sharded"
    again.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert torch.equal(_logits(_load(sharded, dtype=dtype), tiny_tokens), _logits(model, tiny_tokens))


def test_names_of_the_module_can_be_saved_too(tmp_path, tiny_tokens):
    """`save_original_format=False` skips the translation; the file still loads."""
    model = _load(_dense(tmp_path / "dense"), quantization_config=_Config())
    model.save_pretrained(tmp_path / "plain", save_original_format=False)
    assert "model.layers.0.mlp.up_proj.nested_offset" in _tensors(tmp_path / "plain")
    assert torch.equal(_logits(_load(tmp_path / "plain"), tiny_tokens), _logits(model, tiny_tokens))


def test_conv1d(tmp_path, tiny_tokens):
    """GPT-2 stores (d_in, d_out); the file holds the transposed weight, as bitsandbytes' does."""
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=384, n_positions=64)
    GPT2LMHeadModel(config).eval().save_pretrained(tmp_path / "dense")
    model = _load(tmp_path / "dense", quantization_config=_Config(double_quant=False))
    model.save_pretrained(tmp_path / "one")
    state = _tensors(tmp_path / "one")["transformer.h.0.mlp.c_fc.weight.quant_state.bitsandbytes__nf4"]
    assert json.loads(bytes(state.tolist()))["shape"] == [256, 64]
    assert torch.equal(_logits(_load(tmp_path / "one"), tiny_tokens), _logits(model, tiny_tokens))


def _stock(tmp_path, **overrides):
    """A checkpoint that transformers and bitsandbytes write, and its model."""
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **overrides)
    model = _load(_dense(tmp_path / "dense"), quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock", model


@pytest.mark.parametrize("double_quant", [True, False])
def test_file_is_the_one_bitsandbytes_writes(tmp_path, double_quant):
    """Every tensor of the two checkpoints has the same name, dtype and bits."""
    stock, _ = _stock(tmp_path, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant)
    config = _Config(double_quant=double_quant)
    _load(tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16).save_pretrained(tmp_path / "ours")
    theirs, ours = _tensors(stock), _tensors(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype
        assert torch.equal(tensor, ours[name]), name


@pytest.mark.parametrize(
    "overrides",
    [
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"bnb_4bit_quant_type": "fp4"},
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    ],
    ids=["nf4", "fp4", "storage"],
)
def test_reads_what_bitsandbytes_wrote(tmp_path, tiny_tokens, monkeypatch, overrides):
    """Without its package in the way; weights decode to the same bits, and the file survives saving again."""
    stock, theirs = _stock(tmp_path, **overrides)
    monkeypatch.setattr(_Config, "stock", None)
    ours = _load(stock, dtype=torch.bfloat16)
    for name, layer in ours.named_modules():
        if isinstance(layer, LUTLinear):
            weight = theirs.get_submodule(name).weight
            dense = __import__("bitsandbytes").functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(layer.dequantize(), dense), name
    ours.save_pretrained(tmp_path / "again")
    before, after = _tensors(stock), _tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():  # as bytes: codes stored as bfloat16 may spell NaN
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


def test_bitsandbytes_reads_ours(tmp_path, tiny_tokens):
    """Block size 32, which bitsandbytes takes from the quant_state. Its CPU kernel computes in bfloat16.

    Sizes are multiples of the block: where a block crosses rows, the AVX-512 decode of bitsandbytes 0.50.2 is wrong.
    """
    bnb = pytest.importorskip("bitsandbytes")
    model = _load(_dense(tmp_path / "dense"), quantization_config=_Config(block_size=32), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "ours")
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING["bitsandbytes_4bit"] = _Config.stock
    stock = _load(tmp_path / "ours", dtype=torch.bfloat16)
    layer = stock.model.layers[0].mlp.up_proj
    assert isinstance(layer, bnb.nn.Linear4bit)
    assert layer.weight.quant_state.blocksize == 32
    dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(dense, model.model.layers[0].mlp.up_proj.dequantize())
    difference = (_logits(stock, tiny_tokens).float() - _logits(model, tiny_tokens).float()).abs()
    assert difference.max() < 0.1 * _logits(model, tiny_tokens).float().abs().max()


def test_damaged_quant_state_names_the_layer(tmp_path):
    model = _load(_dense(tmp_path / "dense"), quantization_config=_Config())
    model.save_pretrained(tmp_path / "bad")
    tensors = _tensors(tmp_path / "bad")
    key = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    tensors[key] = tensors[key][:-20].clone()
    save_file(tensors, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj: quant_state is not the JSON"):
        _load(tmp_path / "bad")


def test_block_size_comes_from_the_file(tmp_path, tiny_tokens):
    """A config that says nothing about the block size, as bitsandbytes' own."""
    model = _load(_dense(tmp_path / "dense"), quantization_config=_Config(block_size=256))
    model.save_pretrained(tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    del config["quantization_config"]["meta"]["block_size"]
    (tmp_path / "one" / "config.json").write_text(json.dumps(config))
    again = _load(tmp_path / "one")
    layer = again.model.layers[0].mlp.up_proj
    assert layer.block_size == 256
    assert torch.equal(_logits(again, tiny_tokens), _logits(model, tiny_tokens))


def test_base_model_loads_the_file_of_the_whole_model(tmp_path, tiny_tokens):
    """The keys of the file carry a `model.` that the base model's names lack."""
    model = _load(_dense(tmp_path / "dense"), quantization_config=_Config(block_size=128))
    model.save_pretrained(tmp_path / "one")
    base = AutoModel.from_pretrained(tmp_path / "one").eval()
    with torch.no_grad():
        assert torch.equal(base(tiny_tokens).last_hidden_state, model.model(tiny_tokens).last_hidden_state)


def test_config_dictionaries():
    method = NF4(block_size=128, double_quant=False)
    written = to_bnb_config(method, torch.bfloat16, ["lm_head"])
    stock = BitsAndBytesConfig.from_dict(dict(written))
    assert stock.bnb_4bit_compute_dtype == torch.bfloat16
    assert stock.llm_int8_skip_modules == ["lm_head"]
    arguments = from_bnb_config(json.loads(json.dumps(written)))
    assert arguments.pop("modules_to_not_convert") == ["lm_head"]
    assert NF4(**arguments) == method
    foreign = from_bnb_config(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict())
    assert (foreign["block_size"], foreign["double_quant"], foreign["quant_storage"]) == (64, False, "uint8")
    assert not written_here(stock.to_dict())
    with pytest.raises(ValueError, match="only 4-bit checkpoints of bitsandbytes are read here"):
        from_bnb_config({"quant_method": "bitsandbytes", "load_in_8bit": True})
