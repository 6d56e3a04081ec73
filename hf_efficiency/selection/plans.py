"""Which example comes at which draw of a training run, as a pure function of the draw's number.

A run makes `epoch_draws` draws an epoch, numbered from 0 over all epochs. A plan holds from its first draw until the
next plan does, so that a resumed run that knows the plans repeats the very same draws. Shape legend: n examples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hf_efficiency.selection.curriculum import Competence, draw_order

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Plan(Protocol):
    """What the sampler asks."""

    start: int  # the first draw of the plan

    def at(self, draw: int) -> int:
        """The example of a draw, which is not before `start`."""
        ...

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What must be saved to build the plan again besides settings."""
        ...


@dataclass
class SubsetPlan:
    """Goes through the chosen examples in an order drawn anew in each round.

    Attributes:
        start: First draw.
        chosen: Rows of the dataset.
        seed: Of the orders.
    """

    start: int
    chosen: NDArray[np.int64]
    seed: int
    _round: int = field(default=-1, repr=False)
    _order: NDArray[np.int64] | None = field(default=None, repr=False)

    def at(self, draw: int) -> int:
        """The example of a draw."""
        number, place = divmod(draw - self.start, len(self.chosen))
        if number != self._round or self._order is None:
            generator = np.random.default_rng([self.seed, self.start, number])
            self._round, self._order = number, generator.permutation(self.chosen)
        return int(self._order[place])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The chosen rows."""
        return {"chosen": self.chosen}


class _EpochPlan:
    """A plan whose order is made anew for each epoch, from its first draw on or from the plan's own."""

    start: int
    epoch_draws: int
    _epoch = -1
    _order: NDArray[np.int64] | None = None

    def at(self, draw: int) -> int:
        """The example of a draw."""
        epoch = draw // self.epoch_draws
        if epoch != self._epoch or self._order is None:
            self._epoch, self._order = epoch, self._epoch_order(epoch)
        return int(self._order[draw - self._span(epoch).start])

    def _span(self, epoch: int) -> range:
        """The draws of an epoch that are the plan's."""
        return range(max(self.start, epoch * self.epoch_draws), (epoch + 1) * self.epoch_draws)

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        raise NotImplementedError


@dataclass
class CurriculumPlan(_EpochPlan):
    """Draws examples that are easy enough for the competence at the time of the draw.

    Attributes:
        start: First draw.
        difficulty: (n,).
        seed: Of the draws.
        competence: The pace.
        epoch_draws: Draws of an epoch.
        total_draws: Draws of the whole run.
    """

    start: int
    difficulty: NDArray[np.float32]
    seed: int
    competence: Competence
    epoch_draws: int
    total_draws: int

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The difficulties."""
        return {"difficulty": self.difficulty}

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        span = self._span(epoch)
        times = np.arange(span.start, span.stop) / max(1, self.total_draws)
        seed = int(np.random.SeedSequence([self.seed, self.start, epoch]).generate_state(1)[0])
        return draw_order(self.difficulty, self.competence(times), seed)


@dataclass
class MixturePlan(_EpochPlan):
    """Draws the sources in given shares, and goes through the rows of each in an order drawn anew in each round.

    In every epoch each source gets its share to within one draw.

    Attributes:
        start: First draw.
        weights: Share of each source, summing to one.
        seed: Of the orders.
        rows: Rows of each source.
        epoch_draws: Draws of an epoch.
    """

    start: int
    weights: NDArray[np.float64]
    seed: int
    rows: list[NDArray[np.int64]]
    epoch_draws: int

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The weights."""
        return {"weights": self.weights}

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        used = np.zeros(len(self.rows), np.int64)  # draws of each source before this epoch
        first_epoch = self.start // self.epoch_draws
        for earlier in range(first_epoch, epoch):
            used += np.bincount(self._sources(earlier), minlength=len(self.rows))
        sources = self._sources(epoch)
        order = np.empty(len(sources), np.int64)
        for source, rows in enumerate(self.rows):
            places = np.flatnonzero(sources == source)
            order[places] = self._rows_of(source, rows, int(used[source]), len(places))
        return order

    def _sources(self, epoch: int) -> NDArray[np.int64]:
        count = len(self._span(epoch))
        generator = np.random.default_rng([self.seed, self.start, epoch])
        # evenly spaced points on the line of shares hit each share as often as it is long
        points = (np.arange(count) + generator.random()) / count
        sources = np.minimum(np.searchsorted(np.cumsum(self.weights), points, side="right"), len(self.rows) - 1)
        return generator.permutation(sources)

    def _rows_of(self, source: int, rows: NDArray[np.int64], used: int, count: int) -> NDArray[np.int64]:
        parts: list[NDArray[np.int64]] = []
        while count > 0:
            number, place = divmod(used, len(rows))
            generator = np.random.default_rng([self.seed, self.start, source, number])
            part = generator.permutation(rows)[place : place + count]
            parts.append(part)
            used, count = used + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)
