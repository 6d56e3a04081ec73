"""Hidden states of a calibration run, one tensor a micro-batch, kept on the device, in memory or on disk."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import overload

from safetensors.torch import load_file, save_file
from torch import Tensor

OFFLOADS = ("none", "cpu", "disk")


class HiddenStates(Sequence[Tensor]):
    """A list of tensors (b, t, d) that may live elsewhere than where they are used.

    Args:
        offload: `"none"` leaves them where they are made, `"cpu"` moves them to main memory, `"disk"` to temporary
            safetensors files that vanish with this object.
    """

    def __init__(self, offload: str = "none") -> None:
        if offload not in OFFLOADS:
            raise ValueError(f"offload={offload!r} is unknown: choose one of {', '.join(OFFLOADS)}.")
        self.offload = offload
        self._items: list[Tensor | Path] = []
        self._folder = TemporaryDirectory(prefix="hidden-states-") if offload == "disk" else None

    def append(self, x: Tensor) -> None:
        """Adds a micro-batch at the end."""
        self._items.append(self._park(x, len(self._items)))

    def __setitem__(self, i: int, x: Tensor) -> None:
        self._items[i] = self._park(x, i)

    def _park(self, x: Tensor, i: int) -> Tensor | Path:
        x = x.detach()
        if self._folder is None:
            return x.cpu() if self.offload == "cpu" else x
        path = Path(self._folder.name) / f"{i}.safetensors"
        save_file({"x": x.cpu().contiguous()}, path)
        return path

    @overload
    def __getitem__(self, i: int) -> Tensor: ...
    @overload
    def __getitem__(self, i: slice) -> list[Tensor]: ...
    def __getitem__(self, i: int | slice) -> Tensor | list[Tensor]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        item = self._items[i]
        return load_file(item)["x"] if isinstance(item, Path) else item

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))
