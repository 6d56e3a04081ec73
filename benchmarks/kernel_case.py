"""What each kernel's `benchmarks/cases.py` describes: a shape, its cost, how to run it and what it competes with."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent

# Returns the result, or a tuple of results, that correctness is judged by.
Run = Callable[[], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One row of the tables.

    Attributes:
        label: The shape, in words.
        bytes: What must be moved between memory and chip at least once: inputs read, outputs written.
        flops: Operations that must be done, a multiply-add counted as two.
        make: Given a device and a seed, fresh inputs, and by name what runs on them: `"kernel"` and `"reference"`
            always, and what it competes with (`"cuBLAS bf16"`, say).
        tolerance: Largest difference of kernel and reference, relative to the reference's largest magnitude.
        goal: What the project wants of it on an H100, in words; `""` for nothing special.
        memory: Bytes held beyond inputs and results at the worst moment, by who runs; empty where that is no matter.
    """

    label: str
    bytes: int
    flops: int
    make: Callable[[torch.device, int], dict[str, Run]]
    tolerance: float = 1e-2
    goal: str = ""
    memory: Mapping[str, int] = field(default_factory=dict)


def cases_of(folder: Path) -> list[Case]:
    """The cases of the kernel project in `folder`."""
    path = folder / "benchmarks" / "cases.py"
    spec = importlib.util.spec_from_file_location(f"cases_{folder.name}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} can't be imported.")
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cases: list[Case] = module.cases()
    return cases


def projects() -> Iterator[Path]:
    """Folders of the kernel projects, by name."""
    yield from sorted(path.parent for path in (ROOT / "kernels").glob("*/build.toml"))
