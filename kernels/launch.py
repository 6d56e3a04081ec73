"""Chooses between a kernel and its reference, for every kernel project.

Each project on the Kernel Hub stands alone, so this file is linked into each of them as `_launch.py`.
"""

import logging
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("hf_efficiency.kernels")

SETTING = "HF_EFFICIENCY_KERNELS"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Kernels that failed to compile in this process, and why. They are not tried again.
_failed: dict[str, str] = {}


def namespace(package: str | None) -> str:
    """The `torch.library` namespace of a kernel package.

    It follows from the name under which the package is imported, so that a copy loaded from the Kernel Hub and the one
    in `hf_efficiency.kernels` can live in one process.
    """
    return str(package).replace(".", "_").replace("-", "_")


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def enabled() -> bool:
    """Whether kernels run at all: Triton is here, and `HF_EFFICIENCY_KERNELS=reference` is not set."""
    return os.environ.get(SETTING, "").lower() != "reference" and _has_triton()


def kernel_runs(package: str | None, function: str, *tensors: Tensor | None) -> bool:
    """Whether `function` of the package's `kernel.py` would run on these tensors, and not the reference."""
    if f"{package}.{function}" in _failed or not enabled():
        return False
    return INTERPRETED or all(t.is_cuda for t in tensors if t is not None)


def run(package: str | None, function: str, *args: Any) -> Any:
    """Calls `function` of the package's `kernel.py`, or of its `reference.py`, which has the same signature.

    The reference runs on a CPU, where Triton is missing, where the environment sets `HF_EFFICIENCY_KERNELS=reference`,
    and, after one warning that names the reason, where the kernel does not compile on this device.
    """
    tensors = [a for a in args if isinstance(a, Tensor)]
    if kernel_runs(package, function, *tensors):
        from triton.errors import TritonError

        kernel: Callable[..., Any] = getattr(import_module(".kernel", package), function)
        try:
            with torch.cuda.device_of(tensors[0]):
                return kernel(*args)
        except (TritonError, RuntimeError) as error:
            if not _did_not_compile(error):
                raise
            _failed[f"{package}.{function}"] = str(error)
            logger.warning(
                "The Triton kernel %s does not compile on this device; plain torch runs in its place, slower: %s: %s",
                function,
                type(error).__name__,
                error,
            )
    reference: Callable[..., Any] = getattr(import_module(".reference", package), function)
    return reference(*args)


def _did_not_compile(error: Exception) -> bool:
    """Whether an exception comes from Triton's compiler or launcher, and not from what a kernel was given or did."""
    from triton.errors import TritonError

    if isinstance(error, TritonError):
        return not INTERPRETED  # there it is a defect of the kernel
    if type(error) is not RuntimeError:  # torch's out-of-memory and accelerator errors are subclasses
        return False
    return any(mark in str(error) for mark in ("PassManager", "compiler", "LLVM", "Triton Error", "ptxas"))


def shape_class(tensor: Tensor, number: int) -> int:
    """A class of shapes (0 to 15) together with the kind of device that a tensor lies on, as one key for `tuned`."""
    return _device_number(tensor.device) + number


@cache
def _device_number(device: torch.device) -> int:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return zlib.crc32(name.encode()) % (1 << 24) * 16


def _may_measure() -> bool:
    """False where it is no time to run a kernel again and again: a CUDA graph is captured, or torch.compile traces."""
    captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return not captured and not torch.compiler.is_compiling()


def tuned(configs: Sequence[Any], key: Sequence[str], **kwargs: Any) -> Callable[[Any], Any]:
    """`triton.autotune` whose choice is kept on disk, by key and dtype. Where it can't measure: the first config.

    Args:
        configs: `triton.Config`s.
        key: Arguments whose values call for a choice of their own. Bucket sizes before: a choice a class, not a size.
            One of them comes from `shape_class`, which adds the device.
        **kwargs: For `triton.autotune`.
    """
    import triton

    def decorate(function: Any) -> Any:
        used = list(configs[:1]) if INTERPRETED else list(configs)
        tuner = triton.autotune(used, list(key), cache_results=True, **kwargs)(function)
        chosen = tuner.check_disk_cache

        def choose(key: Any, configs: list[Any], measure: Callable[[], None]) -> Any:
            if _may_measure():
                return chosen(key, configs, measure)
            tuner.cache[key] = configs[0]
            return True

        tuner.check_disk_cache = choose
        return tuner

    return decorate


@dataclass(frozen=True)
class Variant:
    """One compilation that a launch may ask for, so that it can be made ahead of time, without a device.

    Attributes:
        label: What tells it from the project's others.
        function: The `@triton.jit` function, without its autotuner.
        signature: Argument name to Triton type (`"*bf16"`, `"i32"`, `"fp32"`), for all that is no constexpr.
        constexprs: Argument name to value.
        num_warps: Of the launch.
        num_stages: Of the launch.
        matrix: The code must use matrix instructions.
        bandwidth_bound: The code must not spill registers, and must load 128 bits at a time.
        divisible: Arguments (pointers, strides, sizes) that are multiples of 16, as the launcher would find.
        targets: Cards whose launches ask for it, such as `"sm_80"`; none named stands for all.
    """

    label: str
    function: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    matrix: bool = False
    bandwidth_bound: bool = False
    divisible: Sequence[str] = ()
    targets: Sequence[str] = ()
