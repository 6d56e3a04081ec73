"""Fixtures shared by all tests: tiny models built offline, text that every Python carries, and the real SmolLM2."""

import os

# Before any host library is imported: nothing may ask the network, and one thread a worker keeps two workers apart.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels are tested on the CPU, by Triton's interpreter, unless told otherwise.
os.environ.setdefault("TRITON_INTERPRET", "1")

import copy
import pydoc_data.topics
import re

import pytest
import torch

from tests import tiny
from tests.loaders import tables_kept


def pytest_collection_modifyitems(items):
    """The file that takes longest goes first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_aot.py")


@pytest.fixture(scope="module", autouse=True)
def _loaders_of_other_modules():
    """What a module prefers ends with it."""
    with tables_kept():
        yield


@pytest.fixture(autouse=True)
def _loaders_of_other_tests():
    """`prefer()` lasts for a process; here it ends with the test, or stock loaders would be gone for all others."""
    with tables_kept():
        yield


@pytest.fixture(scope="session")
def texts():
    """64 paragraphs of English prose, each longer than 200 characters."""
    prose = "\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    paragraphs = [" ".join(block.split()) for block in re.split(r"\n\s*\n", prose)]
    return [p for p in paragraphs if len(p) > 200 and p.isascii()][:64]


@pytest.fixture(scope="session")
def tiny_tokenizer(texts):
    """A byte-level BPE of 384 tokens; decoding what it encodes gives the text back."""
    return tiny.build_tokenizer(texts)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory, tiny_tokenizer):
    """Folder of a two-layer Llama in float32 with its tokenizer. Read only: tests write elsewhere."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    tiny.build_llama(vocab_size=len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _tiny_llama(tiny_tokenizer):
    return tiny.build_llama(vocab_size=len(tiny_tokenizer))


@pytest.fixture
def tiny_llama(_tiny_llama):
    """The model of `tiny_llama_dir`, a fresh copy for each test, so that tests may change it."""
    return copy.deepcopy(_tiny_llama)


@pytest.fixture(scope="module")
def our_loaders():
    """Lets our loaders read every standard format while a module's tests run, whatever else is installed."""
    import hf_efficiency

    for standard in ("gptq", "awq", "bitsandbytes", "compressed-tensors"):
        hf_efficiency.prefer(standard)


@pytest.fixture(scope="session")
def tiny_tokens():
    """Token ids (8, 32) for the tiny models, the same in every run."""
    return torch.randint(3, 256, (8, 32), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32 and its tokenizer. Shared by all tests: copy before changing anything."""
    from hf_efficiency.demo import load_demo_model

    return load_demo_model(dtype=torch.float32)


@pytest.fixture(scope="session")
def smollm2_dir():
    """Checkpoint folder of SmolLM2-135M-Instruct. Read only."""
    from hf_efficiency.demo import demo_model_path

    return demo_model_path()
