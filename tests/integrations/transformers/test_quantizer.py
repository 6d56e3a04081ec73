"""The quantizer behind `from_pretrained`: what it refuses, how it says so, and which layers it takes."""

import json
import logging
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import hf_efficiency
from hf_efficiency import AWQConfig, GPTQConfig, NF4Config, QuIPSharpConfig, RTNConfig
from hf_efficiency.calibration.structure import find_blocks, linears_of
from hf_efficiency.integrations.transformers.register import CONFIGS, register
from hf_efficiency.quantization.layers.base import QuantizedLinear
from tests import tiny
from tests.families import build_family

pytestmark = pytest.mark.usefixtures("our_loaders")

LINEARS = 14  # of the tiny Llama's two blocks


def data(tokens, **more):
    n, t = tokens.shape
    return {"calibration": tokens, "num_samples": n, "seq_len": t, "batch_size": n, "progress": False, **more}


def load(path, config=None, **kwargs):
    if config is not None:  # None would take the checkpoint's own config away
        kwargs["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def quantized_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(tokens).logits


@pytest.fixture(scope="module")
def saved(tiny_llama_dir, tiny_tokens, tmp_path_factory):
    """Folders of quantized checkpoints, by format. Read only."""
    configs = {
        "gptq": RTNConfig(bits=4, group_size=32),
        "awq": RTNConfig(bits=4, group_size=32, format="awq"),
        "nf4": NF4Config(),
        "quip": QuIPSharpConfig(**data(tiny_tokens)),
    }
    folders = {}
    for name, config in configs.items():
        folders[name] = tmp_path_factory.mktemp(name)
        load(tiny_llama_dir, config).save_pretrained(folders[name])
    return folders


@pytest.fixture
def damaged(saved, tmp_path):
    """Copies a checkpoint and changes its tensors and its config."""

    def make(name, change=lambda tensors: None, **config):
        folder = tmp_path / "damaged"
        shutil.copytree(saved[name], folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((folder / "config.json").read_text())
        settings["quantization_config"] |= config
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    return make


class TestDamagedCheckpoints:
    """A clear error that names the tensor, before anything is loaded."""

    LAYER = "model.layers.1.mlp.up_proj"

    @pytest.mark.parametrize(
        ("name", "tensor"),
        [
            ("gptq", "qzeros"),
            ("gptq", "scales"),
            ("awq", "scales"),
            ("nf4", "weight.quant_map"),
            ("nf4", "weight"),
            ("quip", "scale"),
            ("quip", "seed"),
        ],
    )
    def test_missing_tensor(self, damaged, name, tensor):
        folder = damaged(name, lambda tensors: tensors.pop(f"{self.LAYER}.{tensor}"))
        with pytest.raises(ValueError, match=rf"checkpoint has no tensor {self.LAYER}\.{tensor}; it is incomplete"):
            load(folder)

    @pytest.mark.parametrize("name", ["gptq", "awq", "nf4", "quip"])
    def test_missing_layer(self, damaged, name):
        def change(tensors):
            for key in [key for key in tensors if key.startswith(self.LAYER)]:
                del tensors[key]

        with pytest.raises(ValueError, match=rf"holds no weight for {self.LAYER} \(.* expected\). It is incomplete"):
            load(damaged(name, change))

    @pytest.mark.parametrize(
        ("name", "tensor"),
        [("gptq", "qweight"), ("gptq", "g_idx"), ("awq", "qzeros"), ("nf4", "weight"), ("quip", "codes")],
    )
    def test_misshapen_tensor(self, damaged, name, tensor):
        def change(tensors):
            key = f"{self.LAYER}.{tensor}"
            tensors[key] = tensors[key][:-1].clone()

        with pytest.raises(ValueError, match=rf"{self.LAYER}\.{tensor} has shape .* config\.json calls for"):
            load(damaged(name, change))

    @pytest.mark.parametrize("config", [{"bits": 8}, {"group_size": 64}])
    def test_config_of_another_file(self, damaged, config):
        with pytest.raises(ValueError, match=r"has shape .* config\.json calls for .* do not match the weights"):
            load(damaged("gptq", **config))

    def test_not_safetensors(self, saved, tmp_path):
        shutil.copy(saved["gptq"] / "config.json", tmp_path)
        torch.save(load_file(saved["gptq"] / "model.safetensors"), tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin is no safetensors file.*convert it"):
            load(tmp_path)

    def test_version_from_the_future(self, damaged):
        folder = damaged("quip", format_version=2)
        with pytest.raises(ValueError, match=r"quip_sharp format_version=2; hf_efficiency .* reads up to 1\. Upgrade"):
            load(folder)

    @pytest.mark.parametrize(
        ("name", "config", "message"),
        [
            ("gptq", {"checkpoint_format": "marlin"}, "format='marlin' is unknown: choose one of gptq, gptq_v2, awq"),
            ("gptq", {"bits": 5}, "bits=5 is not supported: choose one of 2, 3, 4, 8"),
            ("awq", {"version": "gemv"}, "awq version 'gemv' is not supported: only 'gemm'"),
            ("awq", {"zero_point": False}, r"zero points \(zero_point=false\) are not supported"),
            ("nf4", {"bnb_4bit_quant_type": "int4"}, "quant_type='int4' must be one of nf4, fp4"),
            ("quip", {"bits": 7}, "bits=7 has no lattice codebook"),
        ],
    )
    def test_unknown_kinds(self, damaged, name, config, message):
        with pytest.raises(ValueError, match=message):
            load(damaged(name, **config))


class TestDamagedModels:
    """Dense models that can't be quantized."""

    def save(self, folder, change, **settings):
        model = tiny.build_llama(**settings)
        change(model)
        model.save_pretrained(folder)
        return folder

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    @pytest.mark.parametrize("method", ["rtn", "nf4", "gptq"])
    def test_weight_that_is_not_finite(self, tmp_path, tiny_tokens, method, value):
        def change(model):
            model.model.layers[1].mlp.up_proj.weight.data[2, 3] = value

        config = {"rtn": RTNConfig(), "nf4": NF4Config(), "gptq": GPTQConfig(**data(tiny_tokens))}[method]
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj holds NaN or infinity"):
            load(self.save(tmp_path, change), config)

    @pytest.mark.parametrize("calibrated", [False, True])
    def test_scale_beyond_float16(self, tmp_path, tiny_tokens, calibrated):
        def change(model):
            model.model.layers[1].mlp.up_proj.weight.data[2, 3] = 1e7

        config = GPTQConfig(**data(tiny_tokens)) if calibrated else RTNConfig()
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: .* not finite.*modules_to_not_convert"):
            load(self.save(tmp_path, change), config)

    def test_no_tokenizer(self, tmp_path):
        folder = self.save(tmp_path, lambda model: None)
        with pytest.raises(ValueError, match=r"no tokenizer was found in .* Pass `tokenizer=` in the config"):
            load(folder, GPTQConfig(calibration=["some text"]))

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                RTNConfig(format="awq", group_size=48),
                r"q_proj: the awq format has no ragged last group",
            ),
            (
                AWQConfig(format="awq", group_size=48),
                r"q_proj: the awq format has no ragged last group",
            ),
            (RTNConfig(bits=3), r"_proj: in_features=48 does not fill whole 32-bit words at 3 bits"),
        ],
    )
    def test_sizes_that_the_format_can_not_hold(self, tmp_path, config, message):
        sizes = {"hidden_size": 48, "intermediate_size": 96} if getattr(config, "bits", 4) == 3 else {}
        folder = self.save(tmp_path, lambda model: None, **sizes)
        with pytest.raises(ValueError, match=r"model\.layers\.0\..*" + message):
            load(folder, config)

    def test_calibrating_what_is_offloaded(self, tiny_llama_dir, tiny_tokens, tmp_path):
        device_map = {"model.embed_tokens": "cpu", "model": "disk", "lm_head": "cpu"}
        with pytest.raises(ValueError, match=r"device_map puts weights on disk, where they can't be calibrated"):
            load(tiny_llama_dir, GPTQConfig(**data(tiny_tokens)), device_map=device_map, offload_folder=tmp_path)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RTNConfig(bits=5), ValueError, "bits=5 is not supported"),
        (lambda: RTNConfig(group_size=0), ValueError, "group_size=0 must be a positive integer"),
        (lambda: RTNConfig(granularity="row"), ValueError, "granularity='row' is unknown"),
        (lambda: RTNConfig(granularity="block", block_rows=0), ValueError, "block_rows=0 must be at least 1"),
        (lambda: GPTQConfig(offload="tape"), ValueError, "offload='tape' is unknown"),
        (lambda: GPTQConfig(calibration=[]), ValueError, "calibration is empty"),
        (lambda: GPTQConfig(calibration="c4"), ValueError, "calibration='c4' is unknown"),
        (lambda: GPTQConfig(num_samples=0), ValueError, "num_samples=0 must be a whole number"),
        (lambda: GPTQConfig(format="awq", bits=3), ValueError, "the awq format holds 4-bit codes only"),
        (lambda: QuIPSharpConfig(bits=8), ValueError, "bits=8 has no lattice codebook"),
        (lambda: NF4Config(block_size=48), ValueError, "block_size=48 must be one of 32"),
        (lambda: RTNConfig(damp_percent=0.1), TypeError, "unexpected keyword argument 'damp_percent'"),
    ],
)
def test_bad_arguments_are_refused_when_the_config_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_unknown_method(tiny_llama_dir):
    with pytest.raises(ValueError, match="Unknown quantization type, got magic"):
        load(tiny_llama_dir, {"quant_method": "magic"})


class TestWhichLayers:
    """`modules_to_not_convert`, heads and embeddings."""

    def test_names_add_to_the_defaults(self, tiny_llama_dir, tmp_path):
        model = load(tiny_llama_dir, RTNConfig(group_size=32, modules_to_not_convert=["down_proj"]))
        assert len(quantized_names(model)) == LINEARS - 2
        assert not any("down_proj" in name or "lm_head" in name for name in quantized_names(model))
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert quantized_names(again) == quantized_names(model)
        stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        assert stored["modules_to_not_convert"] == ["down_proj"]
        assert "-:.*down_proj" in stored["dynamic"]  # what gptqmodel and vLLM read

    @pytest.mark.parametrize("skip", [None, []])
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("config", [RTNConfig, NF4Config, GPTQConfig])
    def test_head_is_never_taken(self, tmp_path, tiny_tokens, skip, tied, config):
        tiny.build_llama(tie_word_embeddings=tied).save_pretrained(tmp_path)
        more = data(tiny_tokens) if config is GPTQConfig else {}
        model = load(tmp_path, config(modules_to_not_convert=skip, **more))
        assert len(quantized_names(model)) == LINEARS
        assert type(model.lm_head) is nn.Linear
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied

    @pytest.mark.parametrize(
        "exclude",
        [
            {"modules_to_not_convert": ["model"]},
            {"dynamic": {"-:.*_proj": {}}},
            {"modules_to_not_convert": ["self_attn", "mlp"]},
        ],
    )
    @pytest.mark.parametrize("config", [RTNConfig, GPTQConfig])
    def test_nothing_left(self, tiny_llama_dir, tiny_tokens, exclude, config):
        more = data(tiny_tokens) if config is GPTQConfig else {}
        with pytest.raises(ValueError, match="No linear layer of LlamaForCausalLM is left to quantize"):
            load(tiny_llama_dir, config(**exclude, **more))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"modules_to_not_convert": ["mlp", "v_porj"]}, "modules_to_not_convert names 'v_porj', but Llama"),
            ({"dynamic": {"-:.*v_porj": {}}}, "dynamic names '-:.*v_porj'.*called like model.layers.0.self_attn"),
            ({"dynamic": {"lm_head": {"bits": 8}}}, "dynamic names 'lm_head'"),
            ({"dynamic": {"v_proj": {"bits": 8}}}, "dynamic names 'v_proj'"),
        ],
    )
    def test_name_that_nothing_has(self, tiny_llama_dir, fields, message):
        with pytest.raises(ValueError, match=message):
            load(tiny_llama_dir, RTNConfig(**fields))

    def test_names_outside_the_blocks(self, tiny_llama_dir):
        fields = {"modules_to_not_convert": ["lm_head", "embed_tokens"], "dynamic": {"-:.*lm_head": {}}}
        assert len(quantized_names(load(tiny_llama_dir, RTNConfig(**fields)))) == LINEARS

    def test_no_linear_layers(self, tmp_path):
        settings = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 0, "intermediate_size": 64}
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="has no list of blocks with linear layers"):
            load(tmp_path, RTNConfig())

    @pytest.mark.parametrize("family", ["gpt2", "opt", "phi", "bloom", "gemma2", "mixtral"])
    @pytest.mark.parametrize("config", [RTNConfig(bits=8, group_size=16), NF4Config(block_size=32)])
    def test_families_while_loading(self, family, config, tmp_path, tiny_tokens, caplog):
        """Conv1D, biases, tied heads and fused experts, without calibration."""
        dense = build_family(family)
        dense.save_pretrained(tmp_path / "dense")
        with caplog.at_level(logging.WARNING):
            model = load(tmp_path / "dense", config)
        assert quantized_names(model) == set(linears_of(*find_blocks(dense)))
        expected = logits(dense, tiny_tokens)
        bound = 0.05 if isinstance(config, RTNConfig) else 0.4
        assert (logits(model, tiny_tokens) - expected).norm() < bound * expected.norm()
        model.save_pretrained(tmp_path / "quantized")
        assert torch.equal(logits(load(tmp_path / "quantized"), tiny_tokens), logits(model, tiny_tokens))
        warned = [r for r in caplog.records if "fused expert weights stay dense" in r.getMessage()]
        assert len(warned) == (family == "mixtral")


class TestStockConfigs:
    """transformers' own config classes, after `prefer`."""

    def test_gptq_makes_a_model(self, tiny_llama_dir, tiny_llama, tiny_tokenizer, texts, tiny_tokens):
        stock = transformers.GPTQConfig(
            bits=8, group_size=32, dataset=texts[:16], tokenizer=tiny_tokenizer, model_seqlen=32, sym=True
        )
        model = load(tiny_llama_dir, stock)
        assert len(quantized_names(model)) == LINEARS
        config = model.config.quantization_config
        assert (type(config), config.bits, config.seq_len, config.sym) == (GPTQConfig, 8, 32, True)
        expected = logits(tiny_llama, tiny_tokens)
        assert (logits(model, tiny_tokens) - expected).norm() < 0.05 * expected.norm()

    def test_awq_makes_a_model(self, tiny_llama_dir, tiny_tokens):
        model = load(tiny_llama_dir, transformers.AwqConfig(bits=4, group_size=32, modules_to_not_convert=["mlp"]))
        assert len(quantized_names(model)) == 8
        assert model.config.quantization_config.to_dict()["quant_method"] == "awq"

    def test_bitsandbytes_makes_a_model(self, tiny_llama_dir, tiny_tokens, saved):
        stock = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        assert torch.equal(logits(load(tiny_llama_dir, stock), tiny_tokens), logits(load(saved["nf4"]), tiny_tokens))

    @pytest.mark.parametrize(
        ("name", "stock"),
        [
            ("gptq", transformers.GPTQConfig(bits=4)),
            ("awq", transformers.AwqConfig(bits=4)),
            ("nf4", transformers.BitsAndBytesConfig(load_in_4bit=True)),
        ],
    )
    @pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
    def test_stock_config_along_with_a_checkpoint(self, saved, name, stock, tiny_tokens):
        """The file's own config wins."""
        assert torch.equal(logits(load(saved[name], stock), tiny_tokens), logits(load(saved[name]), tiny_tokens))

    def test_dataset_by_name(self, tiny_llama_dir):
        with pytest.raises(ValueError, match="dataset='c4' would have to be downloaded by name; give a list of texts"):
            load(tiny_llama_dir, transformers.GPTQConfig(bits=4, dataset="c4"))

    def test_what_is_not_supported(self, tiny_llama_dir):
        stock = transformers.GPTQConfig(bits=4)
        stock.modules_in_block_to_quantize = [["self_attn.q_proj"]]  # its constructor would ask for optimum
        with pytest.raises(ValueError, match="modules_in_block_to_quantize is not supported"):
            load(tiny_llama_dir, stock)
        with pytest.raises(ValueError, match="only 4-bit checkpoints of bitsandbytes"):
            hf_efficiency.integrations.transformers.quantizer.EfficiencyQuantizer(
                transformers.BitsAndBytesConfig(load_in_8bit=True)
            )


def test_registering_twice_changes_nothing():
    from transformers.quantizers import auto

    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    register()
    assert before[0] == auto.AUTO_QUANTIZER_MAPPING
    assert all(auto.AUTO_QUANTIZATION_CONFIG_MAPPING[c.default_name] is c for c in CONFIGS)


def test_prefer_an_unknown_format():
    with pytest.raises(ValueError, match=r"prefer\('exl2'\): choose one of gptq, awq, bitsandbytes"):
        hf_efficiency.prefer("exl2")


def test_texts_use_the_tokenizer_beside_the_model(tiny_llama_dir, tiny_tokenizer, texts, tiny_tokens):
    settings = {"num_samples": 4, "seq_len": 32, "progress": False, "bits": 8}
    beside, named, given = (
        load(tiny_llama_dir, GPTQConfig(calibration=texts[:8], tokenizer=tokenizer, **settings))
        for tokenizer in (None, str(tiny_llama_dir), tiny_tokenizer)
    )
    assert torch.equal(logits(beside, tiny_tokens), logits(given, tiny_tokens))
    assert torch.equal(logits(named, tiny_tokens), logits(given, tiny_tokens))
    assert given.config.quantization_config.tokenizer is None


def test_self_calibration(tiny_llama_dir, tiny_llama, tiny_tokens):
    model = load(tiny_llama_dir, GPTQConfig(calibration="self", num_samples=4, seq_len=16, bits=8, progress=False))
    expected = logits(tiny_llama, tiny_tokens)
    assert (logits(model, tiny_tokens) - expected).norm() < 0.05 * expected.norm()


def test_parts_on_disk(tiny_llama_dir, tiny_tokens, tmp_path, saved):
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    expected = logits(load(saved["gptq"]), tiny_tokens)
    for name, (path, config) in {
        "made": (tiny_llama_dir, RTNConfig(group_size=32)),
        "read": (saved["gptq"], None),
    }.items():
        model = load(path, config, device_map=device_map, offload_folder=tmp_path / name)
        assert torch.equal(logits(model, tiny_tokens), expected)
