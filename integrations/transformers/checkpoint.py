"""Looks into the headers of a checkpoint before anything is loaded."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open

# Tensors that a format defines but some writers leave out, because they follow from the others.
OPTIONAL_TENSORS = frozenset({"g_idx"})

Shapes = Mapping[str, tuple[int, ...]]


def read_shapes(files: Iterable[str | Path] | None) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the safetensors files of a checkpoint.

    Raises:
        ValueError: If a file is no safetensors file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files or []:
        if Path(file).suffix != ".safetensors":
            raise ValueError(
                f"{file} is no safetensors file. Quantized checkpoints are read from safetensors only; convert it."
            )
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - no mapping
                shapes[key] = tuple(handle.get_slice(key).get_shape())
    return shapes


class CheckpointIndex:
    """Finds a module's tensors in a checkpoint whose keys may lack or carry the base model's prefix.

    Args:
        shapes: From `read_shapes`.
        prefix: `model.base_model_prefix`.
        rename: Turns a key of the file into the name inside the model (formats whose names hold dots).
    """

    def __init__(self, shapes: Shapes, prefix: str) -> None:
        self.shapes = shapes
        self.prefix = f"{prefix}." if prefix else ""

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Shape of the tensor called `key`, or None."""
        for candidate in (key, key.removeprefix(self.prefix), self.prefix + key):
            if candidate in self.shapes:
                return self.shapes[candidate]
        return None

    def __contains__(self, key: str) -> bool:
        return self.shape(key) is not None

    def check(self, name: str, expected: Mapping[str, tuple[int, ...]]) -> set[str]:
        """Compares the stored tensors of module `name` with what its layer declares.

        Returns:
            Optional tensors that are missing.

        Raises:
            ValueError: If a tensor is missing or has another shape.
        """
        missing = set()
        for tensor, shape in expected.items():
            found = self.shape(f"{name}.{tensor}")
            if found is None and tensor in OPTIONAL_TENSORS:
                missing.add(tensor)
            elif found is None:
                raise ValueError(f"The checkpoint has no tensor {name}.{tensor}; it is incomplete. Download it again.")
            elif found != shape:
                raise ValueError(
                    f"{name}.{tensor} has shape {found} in the checkpoint, but config.json calls for {shape}: "
                    "bits, group_size or the architecture do not match the weights."
                )
        return missing
