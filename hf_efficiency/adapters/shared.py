"""What several adapters of one model have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from hf_efficiency.adapters.base import LinearAdapter


class SharedParameter:
    """A trained tensor that the adapters of several layers share.

    The first adapter that joins holds it as its parameter and the others read it there, so that it is trained, moved,
    saved and loaded once, also where loading replaces parameters.

    Args:
        name: Of the parameter in the adapter that holds it.
        values: Where it starts.
    """

    def __init__(self, name: str, values: Tensor) -> None:
        self.name, self.values = name, values
        self.holder: LinearAdapter | None = None

    def join(self, adapter: LinearAdapter) -> None:
        """Called by each adapter that reads the tensor, in the order of the layers."""
        if self.holder is None:
            self.holder = adapter
            adapter.register_parameter(self.name, nn.Parameter(self.values))

    def on(self, like: Tensor) -> Tensor:
        """The tensor on the device of `like`."""
        values: Tensor = getattr(self.holder, self.name)
        return values.to(like.device)
