"""Turn a GGUF file into an ordinary checkpoint folder.

`transformers` reads GGUF files, but not together with a `quantization_config`: a model to compress goes through a
checkpoint folder first.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_efficiency.saving import staged_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_METADATA = ("general.license", "general.languages", "tokenizer.ggml.pre")


def convert_gguf(
    file: str | Path, out: str | Path, *, base_model: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write the model and tokenizer in the GGUF `file` to the folder `out`, dequantized to `dtype`.

    The folder is made atomically; one that exists by then is kept. Its README carries the licence and languages that
    the file names, and `base_model` if given.

    Raises:
        ValueError: the file does not exist or is no GGUF file.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = Path(file)
    metadata = _read_metadata(file)
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
    )
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    _repair_pre_tokenizer(tokenizer, metadata.get("tokenizer.ggml.pre"))
    tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    with staged_folder(out, keep_existing=True) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(_readme(file.name, metadata, base_model, dtype), encoding="utf-8")
    return Path(out)


def _read_metadata(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    if not file.is_file():
        raise ValueError(f"the GGUF file {str(file)!r} does not exist")
    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ValueError(f"{str(file)!r} is no GGUF file: it does not begin with the letters GGUF")
    fields = GGUFReader(file).fields
    return {name: fields[name].contents() for name in _METADATA if name in fields}


def _repair_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, kind: str | None) -> None:
    """SmolLM splits every digit off before the byte-level step; transformers' conversion leaves this out.

    The difference is rare but real: two spaces before a digit tokenize otherwise than in training.
    """
    if kind != "smollm":
        return
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _readme(name: str, metadata: dict[str, Any], base_model: str | None, dtype: torch.dtype) -> str:
    from huggingface_hub import ModelCardData

    known = {"license": metadata.get("general.license"), "language": metadata.get("general.languages")}
    data = ModelCardData(base_model=base_model, **{key: value for key, value in known.items() if value})
    kind = str(dtype).removeprefix("torch.")
    return f"---\n{data.to_yaml()}\n---\n\nThe weights of `{name}`, dequantized to {kind}.\n"
