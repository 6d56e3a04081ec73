"""Sizes: bits per weight, bytes on disk, peak memory. Everything is counted from the tensors that are really stored."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True)
class BitsPerWeight:
    """Stored bits for each weight of the model it stands for: codes, scales, zeros, indices and tables all counted."""

    quantized: float | None  # over the quantized linear layers, biases left out; None if there are none
    total: float  # over every parameter of the model; a tensor shared by several modules counts once


def bits_per_weight(model: nn.Module) -> BitsPerWeight:
    """Count the stored bytes of `model` against the weights they stand for.

    A layer is quantized when it has `in_features` and `out_features` but no floating-point parameter of that size;
    this holds for this package's layers and for other packages' alike. Buffers that are not saved are not counted.

    Raises:
        ValueError: the model has no parameters and no buffers.
    """
    layers = {name: module for name, module in model.named_modules() if _is_quantized(module)}
    owned = [(name, tensor) for layer in layers.values() for name, tensor in _stored(layer)]
    code_bytes = sum(tensor.nbytes for name, tensor in _once(owned) if name != "bias")
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    taken = {_storage_key(tensor) for _, tensor in owned}
    rest = [(name, tensor) for name, tensor in _once(_stored(model)) if _storage_key(tensor) not in taken]
    biases = sum(tensor.numel() for name, tensor in _once(owned) if name == "bias")
    stored = sum(tensor.nbytes for _, tensor in _once(owned)) + sum(tensor.nbytes for _, tensor in rest)
    parameters = weights + biases + sum(tensor.numel() for _, tensor in rest)
    if parameters == 0:
        raise ValueError(f"{type(model).__name__} holds no tensors, so it has no bits per weight")
    return BitsPerWeight(8 * code_bytes / weights if weights else None, 8 * stored / parameters)


def bytes_on_disk(checkpoint: nn.Module | str | Path) -> int:
    """Bytes of the weight files in a checkpoint folder, or of what a model's `save_pretrained` would write.

    Tokenizer, configuration and card are not counted. For a model in memory each shared tensor counts once; the
    safetensors header (some kB) is not foreseen.

    Raises:
        ValueError: the folder holds no weight file.
    """
    if not isinstance(checkpoint, (str, Path)):
        return sum(tensor.nbytes for _, tensor in _once(_stored(checkpoint)))
    folder = Path(checkpoint)
    for pattern in _WEIGHT_FILES:
        files = list(folder.glob(pattern))
        if files:
            return sum(file.stat().st_size for file in files)
    raise ValueError(f"{str(folder)!r} holds no weight file ({', '.join(_WEIGHT_FILES)})")


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Peak memory in bytes: of this process's GPU tensors since the last reset, or on a CPU of the process itself.

    On a GPU this is `torch.cuda.max_memory_allocated`. On a CPU it is the peak resident set of the whole process since
    its program started: the Python interpreter, the libraries and everything done before are in it, so a figure for
    one model needs a process that loaded nothing else. The command line starts one for each model.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # not ru_maxrss: a child process starts with the peak of its parent
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _stored(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors of the state dict, by their full names."""
    return [(name, tensor) for name, tensor in module.state_dict().items() if isinstance(tensor, torch.Tensor)]


def _once(tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Without second names of one tensor (tied heads)."""
    unique = {_storage_key(tensor): (name, tensor) for name, tensor in tensors}
    return list(unique.values())


def _storage_key(tensor: Tensor) -> tuple[object, ...]:
    if tensor.is_meta or tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.dtype)


def _is_quantized(module: nn.Module) -> bool:
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not isinstance(d_in, int) or not isinstance(d_out, int):
        return False
    weight = module._parameters.get("weight")
    if weight is not None:
        return not weight.is_floating_point() or weight.numel() != d_in * d_out
    return any(True for _ in module.buffers(recurse=False))  # an adapter's wrapper has features but no tensors
