"""A teacher that is the running average of its student (Tarvainen & Valpola 2017, mean teacher)."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class EMATeacher:
    """A copy of the student whose trained weights follow as teacher ← decay · teacher + (1 - decay) · student.

    Frozen weights and quantized ones are shared with the student, not copied.

    Attributes:
        model: The averaged model, in evaluation mode, without gradients.

    Raises:
        ValueError: decay is not from 0 to below 1.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay={decay} must be at least 0 and below 1: 0.999 follows over about 1000 steps.")
        self.decay = decay
        shared: dict[int, Any] = {id(p): p for p in student.parameters() if not p.requires_grad}
        shared |= {id(b): b for b in student.buffers() if not b.is_floating_point()}
        self._sources = [p for p in student.parameters() if p.requires_grad]
        own = {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in self._sources}
        self.model: Any = copy.deepcopy(student, {**shared, **own}).eval()
        self._averages = list(own.values())

    @torch.no_grad()
    def update(self) -> None:
        """Follows the student's weights of now."""
        for average, source in zip(self._averages, self._sources, strict=True):
            average.lerp_(source.detach().to(average.dtype), 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, in the order of the student's trained parameters."""
        return {f"ema.{i}": average for i, average in enumerate(self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            ValueError: It is that of another student.
        """
        for name, average in self.state_dict().items():
            if name not in state or state[name].shape != average.shape:
                raise ValueError("The checkpoint's averaged teacher belongs to another student: resume with the same.")
            average.copy_(state[name])
