"""Which singular directions of which matrices stay (AdaLoRA, Zhang et al. 2023).

Shapes: d_in, d_out features of a layer, r its rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hf_efficiency.adapters.triplet import Directions

Importance = Literal["sensitivity", "gradient_norm", "magnitude"]
IMPORTANCES: tuple[str, ...] = get_args(Importance)


@dataclass(frozen=True)
class BudgetSchedule:
    """How many directions may stay after each step (equation 12): all, then a cubic decay, then the target.

    Attributes:
        total_step: Optimizer steps of the training.
        tinit: Steps before the decay.
        tfinal: Steps after it, with the ranks fixed.
        interval: Steps between two allocations.
        first, last: Directions of all matrices together at the beginning and at the end.

    Raises:
        ValueError: The steps leave no room for the decay, or there are to be more directions than at the beginning.
    """

    total_step: int
    tinit: int
    tfinal: int
    interval: int
    first: int
    last: int

    def __post_init__(self) -> None:
        if self.tinit >= self.decided:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of {self.total_step} training steps for "
                "reducing the ranks: lower them, or train longer."
            )
        if self.last > self.first:
            raise ValueError(
                f"the target of {self.last} directions is above the {self.first} at the beginning: lower target_r or "
                "raise init_r."
            )

    @property
    def decided(self) -> int:
        """The step at which the ranks are fixed."""
        return self.total_step - self.tfinal

    def budget(self, step: int) -> int:
        """Directions that may stay after step number `step`, counted from 1."""
        if step <= self.tinit:
            return self.first
        if step >= self.decided:
            return self.last
        rest = 1 - (step - self.tinit) / (self.decided - self.tinit)
        return int(self.last + (self.first - self.last) * rest**3)


class RankAllocator:
    """Scores the directions of all matrices and sets e to zero for those above the budget.

    Args:
        matrices: The directions by the name of their matrix.
        schedule: The budget.
        importance: `"sensitivity"`: |parameter * gradient|, smoothed, times its uncertainty, of e plus the means over
            the row of A and the column of B (equations 8 to 11). `"gradient_norm"`: |e| times the norm of the gradient
            of e, the row and the column together, smoothed. `"magnitude"`: |e|.
        beta1: Of the smoothing.
        beta2: Of the smoothing of the uncertainty.
    """

    def __init__(
        self,
        matrices: Mapping[str, Directions],
        schedule: BudgetSchedule,
        importance: Importance = "sensitivity",
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        if importance not in IMPORTANCES:
            raise ValueError(f"importance={importance!r} must be one of {', '.join(IMPORTANCES)}.")
        self.matrices, self.schedule, self.importance = matrices, schedule, importance
        self.beta1, self.beta2 = beta1, beta2
        # Which directions stay, (r,) each; empty before the first allocation.
        self.kept: dict[str, Tensor] = {}
        self._fixed = False
        self._averages: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Observes the gradients and allocates. To be called after the optimizer's step, before they are cleared.

        Args:
            step: The number of optimizer steps so far, this one included.
        """
        schedule = self.schedule
        if not self._fixed:
            self._observe()
        if step >= schedule.decided:
            self.finish()
        elif step > schedule.tinit and step % schedule.interval == 0:
            self._choose(schedule.budget(step))
            self._mask()

    @torch.no_grad()
    def finish(self) -> None:
        """Leaves exactly the target, as it was fixed, or now where the training ends early."""
        if not self._fixed:
            self._choose(self.schedule.last)
            self._fixed = True
        self._mask()

    def state_dict(self) -> dict[str, Tensor]:
        """All that later allocations depend on, for a checkpoint."""
        kept = {f"kept.{name}": rows for name, rows in self.kept.items()}
        averages = {f"average.{name}": value for name, value in self._averages.items()}
        return {"fixed": torch.tensor(self._fixed), **kept, **averages}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: It is of other matrices.
        """
        kept = {name.removeprefix("kept."): rows for name, rows in state.items() if name.startswith("kept.")}
        for name, rows in kept.items():
            if name not in self.matrices or rows.numel() != self.matrices[name].e.numel():
                raise ValueError(f"the checkpoint's ranks are of another model or config: {name} does not fit.")
        self.kept = {name: rows.to(self.matrices[name].e.device) for name, rows in kept.items()}
        self._fixed = bool(state["fixed"])
        self._averages = {
            name.removeprefix("average."): value for name, value in state.items() if name.startswith("average.")
        }

    def scores(self) -> dict[str, Tensor]:
        """The importance of each direction, (r,) a matrix."""
        if self.importance == "magnitude":
            return {name: d.e.detach().abs().flatten() for name, d in self.matrices.items()}
        return {
            name: self._averages[name].sum(0) if name in self._averages else torch.zeros_like(d.e).flatten()
            for name, d in self.matrices.items()
        }

    def _observe(self) -> None:
        for name, directions in self.matrices.items():
            if self.importance == "gradient_norm":
                new = _gradient_norm(directions)[None]
                old = self._averages.get(name)
                old = torch.zeros_like(new) if old is None else old.to(new)
                self._averages[name] = self.beta1 * old + (1 - self.beta1) * new
            elif self.importance == "sensitivity":
                self._averages[name] = torch.stack(
                    [
                        self._smooth(f"{name}/e", directions.e).flatten(),
                        self._smooth(f"{name}/a", directions.a).mean(1),
                        self._smooth(f"{name}/b", directions.b).mean(0),
                    ]
                )

    def _smooth(self, name: str, parameter: Tensor) -> Tensor:
        """The smoothed sensitivity times the uncertainty of each entry (equations 9 to 11)."""
        new = _sensitivity(parameter)
        for key in (f"{name}/mean", f"{name}/spread"):
            old = self._averages.get(key)
            self._averages[key] = torch.zeros_like(new) if old is None else old.to(new)
        mean = self._averages[f"{name}/mean"].lerp_(new, 1 - self.beta1)
        spread = self._averages[f"{name}/spread"].lerp_((new - mean).abs(), 1 - self.beta2)
        return mean * spread

    def _choose(self, budget: int) -> None:
        """The best `budget` directions of all matrices; of equal ones those that come first."""
        scores = self.scores()
        best = torch.cat(list(scores.values())).argsort(descending=True, stable=True)[:budget]
        rows = torch.zeros(sum(s.numel() for s in scores.values()), dtype=torch.bool, device=best.device)
        rows[best] = True
        self.kept = dict(zip(scores, rows.split([s.numel() for s in scores.values()]), strict=True))

    def _mask(self) -> None:
        for name, rows in self.kept.items():
            e = self.matrices[name].e
            e.masked_fill_(~rows.view_as(e).to(e.device), 0.0)


def orthogonality(matrices: Iterable[Directions]) -> Tensor:
    """How far A and B are from orthonormal rows and columns: the mean of |A A^T - I| and |B^T B - I| over all matrices.

    The paper's equation 7 has the squares; its program, and PEFT with it, takes the norms, and so do we, so that a
    weight means the same.
    """
    norms = []
    for directions in matrices:
        for gram in (directions.a @ directions.a.T, directions.b.T @ directions.b):
            norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
    return torch.stack([norm.to(norms[0]) for norm in norms]).mean()


def add_orthogonality_gradient(matrices: Iterable[Directions], weight: float) -> None:
    """Adds the gradient of `weight` times `orthogonality` to what the loss has left in the parameters.

    It belongs between the backward pass and the optimizer's step, once a step. The loss that is logged, and that of an
    evaluation, stay those of the language model.
    """
    matrices = list(matrices)
    factors = [factor for directions in matrices for factor in (directions.a, directions.b)]
    with torch.enable_grad():
        gradients = torch.autograd.grad(weight * orthogonality(matrices), factors)
    for factor, gradient in zip(factors, gradients, strict=True):
        factor.grad = gradient if factor.grad is None else factor.grad.add_(gradient)


def _sensitivity(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return (parameter.detach() * parameter.grad).abs()


def _gradient_norm(directions: Directions) -> Tensor:
    """|e| sqrt(|grad e|^2 + |grad of A's row|^2 + |grad of B's column|^2), (r,)."""
    e, a, b = directions
    squares = torch.zeros_like(e).flatten()
    if e.grad is not None:
        squares += e.grad.flatten().square()
    for parameter, dim in ((a, 1), (b, 0)):
        if parameter.grad is not None:
            squares += parameter.grad.square().sum(dim)
    return e.detach().abs().flatten() * squares.sqrt()
