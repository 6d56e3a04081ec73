"""Quantized bases, each built once a module."""

from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_efficiency.quantization.layers.base import QuantizedLinear
from tests import tiny
from tests.methods import METHODS


@pytest.fixture(scope="session")
def base_tokens():
    """(4, 24): calibrates the bases, and is what adapters train on."""
    return torch.randint(3, 256, (4, 24), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory, base_tokens, our_loaders):
    """Folder of the tiny Llama quantized by a method of `tests.methods`; "dense" for none. Read only."""

    @cache
    def build(method, dtype, tied):
        path = tmp_path_factory.mktemp(method)
        model = tiny.build_llama(tie_word_embeddings=tied)
        model.to(getattr(torch, dtype)).save_pretrained(path / "dense")
        if method == "dense":
            return path / "dense"
        config = METHODS[method].build(base_tokens)
        AutoModelForCausalLM.from_pretrained(path / "dense", quantization_config=config).save_pretrained(path)
        return path

    return lambda method, dtype="float32", tied=False: build(method, dtype, tied)


@pytest.fixture(scope="module")
def load_base(base_dir):
    """A fresh model of a method."""

    def load(method, dtype="float32", tied=False):
        return AutoModelForCausalLM.from_pretrained(base_dir(method, dtype, tied))

    return load


def packed_layers(model):
    """Storage layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@torch.no_grad()
def logits(model, tokens):
    return model.eval()(input_ids=tokens).logits


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()
