"""Steering the sampler of a Trainer's running dataloader, and keeping the plan in its checkpoints."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch.utils.data import Sampler

from hf_efficiency.selection.plans import SubsetPlan
from hf_efficiency.selection.pool import checksum
from transformers import TrainerCallback
from transformers.utils import logging

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_efficiency.selection.plans import Plan
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.get_logger(__name__)


class SteeredSampler(Sampler[int]):
    """As many draws an epoch as the sampler it replaces, each taken from the plan that holds for it.

    Attributes:
        epoch: Set before each epoch.
        drawn: Draws made in this epoch so far, with those that the dataloader fetched ahead.
        plans: In the order of their first draws; the first holds from draw 0.
    """

    def __init__(self, base: Sampler[int], draws: int) -> None:
        self.base = base
        self.draws = draws
        self.epoch = 0
        self.drawn = 0
        self.plans: list[Plan] = []

    def __len__(self) -> int:
        return self.draws

    def __iter__(self) -> Iterator[int]:
        self.drawn = 0
        first = self.epoch * self.draws
        for draw in range(first, first + self.draws):
            plan = self.active(draw)
            self.drawn += 1
            yield plan.at(draw)

    def active(self, draw: int) -> Plan:
        """The plan that holds for a draw."""
        for plan in reversed(self.plans):
            if plan.start <= draw:
                return plan
        raise RuntimeError(f"no plan holds for draw {draw}; the first begins at {self.plans[0].start}.")

    def needed(self) -> list[Plan]:
        """The plans that hold in this epoch or later; a resumed run repeats its epoch from the start."""
        first = self.epoch * self.draws
        last = len(self.plans) - 1
        return [plan for i, plan in enumerate(self.plans) if i == last or self.plans[i + 1].start > first]


class SteeringCallback(TrainerCallback):
    """What the callbacks share: they replace the sampler when training begins, and make a plan when it is time.

    A new plan holds from the first batch that no process has fetched yet: the dataloader looks one batch ahead, and
    more with workers. All draws follow from the plans and the number of the draw, so that a resumed run repeats them.

    Args:
        every: Optimizer steps between plans, `"epoch"`, or None for one plan.
        warmup: Optimizer steps before the first one; until then all examples are drawn.
        seed: Of the order of the draws; by default the Trainer's `data_seed` or `seed`.
        checkpoint: The folder that a run is resumed from, where it is not `checkpoint-N` in the Trainer's `output_dir`.
        batch_size: Examples that are scored together in a process; by default twice the training batch.

    Attributes:
        report: What the last plan was made from.
    """

    _file: str

    def __init__(
        self,
        every: int | str | None = None,
        warmup: int = 0,
        seed: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        batch_size: int | None = None,
    ) -> None:
        if every is not None and every != "epoch" and (not isinstance(every, int) or every < 1):
            raise ValueError(f"every={every!r} must be a number of steps of at least 1, 'epoch', or None for once.")
        if warmup < 0:
            raise ValueError(f"warmup={warmup} must not be negative.")
        self.every, self.warmup, self.checkpoint, self.batch_size = every, warmup, checkpoint, batch_size
        self.report: dict[str, Any] = {}
        self._seed = seed
        self._sampler: SteeredSampler | None = None

    # what a callback brings

    def _settings(self) -> dict[str, Any]:
        """What decides about the plans, for the checksum in checkpoints."""
        raise NotImplementedError

    def _prepare(self, dataloader: Any, model: Any, processing_class: Any) -> None:
        """Checks before training; called when the sampler is there and no plan is."""

    def _first_plan(self) -> Plan:
        """The plan from draw 0: all examples."""
        return SubsetPlan(0, np.arange(len(self.dataset)), self.seed)

    def _new_plan(self, start: int, model: Any) -> Plan:
        raise NotImplementedError

    def _restore(self, start: int, arrays: Mapping[str, NDArray[Any]]) -> Plan:
        raise NotImplementedError

    def _memory(self) -> dict[str, NDArray[Any]]:
        """What later plans depend on besides the model."""
        return {}

    def _recall(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Takes back `_memory`."""

    # the Trainer's events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the sampler's place; restores the plans of a resumed run."""
        dataloader = kwargs["train_dataloader"]
        self.seed = next(seed for seed in (self._seed, args.data_seed, args.seed) if seed is not None)
        self._args = args
        self._batches = attach(dataloader)
        self._sampler = self._batches.sampler
        self._steps_per_epoch = max(1, -(-len(dataloader) // args.gradient_accumulation_steps))
        self._batch = _batch_draws(dataloader)
        self.total_draws = state.max_steps * args.gradient_accumulation_steps * self._batch
        self._epochs_begun = state.global_step // self._steps_per_epoch
        self._sampler.epoch = self._epochs_begun
        self.dataset, self.collate = dataloader.dataset, dataloader.collate_fn
        self._prepare(dataloader, kwargs["model"], kwargs.get("processing_class"))
        if state.global_step:
            self._load(args, state.global_step)
        else:
            self._sampler.plans = [self._first_plan()]
            if self.warmup == 0 and self.every != "epoch":
                self._make_plan(0, kwargs["model"])

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tells the sampler the epoch, and makes the epoch's plan if there is one to make."""
        sampler = self._attached()
        sampler.epoch, start = self._epochs_begun, self._epochs_begun * sampler.draws
        sampler.drawn = 0
        self._epochs_begun += 1
        known = any(plan.start == start for plan in sampler.plans) and start > 0
        resumed_inside = state.global_step % self._steps_per_epoch != 0
        if self.every == "epoch" and state.global_step >= self.warmup and not known and not resumed_inside:
            self._make_plan(start, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Makes a plan where it is time for one."""
        if self.every == "epoch" or state.global_step < max(1, self.warmup) or state.global_step >= state.max_steps:
            return
        since = state.global_step - self.warmup
        due = since == 0 if self.every is None else since % int(self.every) == 0
        if due:
            sampler = self._attached()
            drawn = largest_over_processes(sampler.drawn, args)
            ahead = min(sampler.draws, -(-drawn // self._batch) * self._batch)
            self._make_plan(sampler.epoch * sampler.draws + ahead, kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts the plans beside the checkpoint's other files."""
        folder = _checkpoint(args, state.global_step)
        if not state.is_world_process_zero:
            return
        if not folder.is_dir():
            logger.warning(f"{folder} is not there, so the data selection is not saved with this checkpoint.")
            return
        arrays: dict[str, NDArray[Any]] = {f"memory.{name}": value for name, value in self._memory().items()}
        needed = self._attached().needed()
        for i, plan in enumerate(needed):
            arrays.update({f"{i}.{name}": np.ascontiguousarray(value) for name, value in plan.arrays().items()})
        record = {"settings": self._checksum(), "starts": [plan.start for plan in needed], "step": state.global_step}
        partial = folder / f".{self._file}.part"
        save_file(arrays, partial, metadata={"selection": json.dumps(record)})
        os.replace(partial, folder / self._file)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the dataloader its own sampler back."""
        self._batches.sampler = self._attached().base

    # inside

    @property
    def _score_rows(self) -> int:
        """Examples that are scored together in a process."""
        return self.batch_size or 2 * self._args.per_device_train_batch_size

    def _attached(self) -> SteeredSampler:
        if self._sampler is None:
            raise RuntimeError("training has not begun: the callback has no sampler yet.")
        return self._sampler

    def _make_plan(self, start: int, model: Any) -> None:
        sampler = self._attached()
        with undisturbed():
            plan = self._new_plan(start, model)
        sampler.plans = [old for old in sampler.plans if old.start < start] + [plan]
        sampler.plans = sampler.needed()

    def _checksum(self) -> str:
        sampler = self._attached()
        common = {"draws": sampler.draws, "rows": len(self.dataset), "seed": self.seed, "every": self.every}
        return checksum(sorted({**self._settings(), **common, "warmup": self.warmup}.items()))

    def _load(self, args: TrainingArguments, step: int) -> None:
        folder = _checkpoint(args, step) if self.checkpoint is None else Path(self.checkpoint)
        file = folder / self._file
        if not file.is_file():
            raise ValueError(
                f"the run resumes at step {step}, but {str(file)!r} is not there: the checkpoint was saved without "
                f"{type(self).__name__}, or it lies elsewhere (then set checkpoint=)."
            )
        from safetensors import safe_open

        with safe_open(str(file), "np") as opened:
            record = json.loads(opened.metadata()["selection"])
        if record["settings"] != self._checksum():
            raise ValueError(
                f"the checkpoint {str(folder)!r} was saved with another selection (checksum {record['settings']}, now "
                f"{self._checksum()}): the strategy, its settings, the seed, the dataset or the batch size differ. "
                "Resume with the same ones, or start anew."
            )
        if record["step"] != step:
            raise ValueError(f"{str(file)!r} belongs to step {record['step']}, but the run resumes at step {step}.")
        arrays = load_file(file)
        self._attached().plans = [
            self._restore(start, _under(f"{i}.", arrays)) for i, start in enumerate(record["starts"])
        ]
        self._recall(_under("memory.", arrays))


def attach(dataloader: Any) -> Any:
    """Puts a `SteeredSampler` in the place of the dataloader's sampler, and returns the batch sampler that has it.

    Raises:
        ValueError: the dataloader has no sampler, or is steered already.
    """
    batches = getattr(dataloader, "batch_sampler", None)
    if batches is None or isinstance(dataloader.dataset, torch.utils.data.IterableDataset):
        raise ValueError(
            "the training dataset is a stream, which has no sampler to steer: choose the data beforehand with "
            "select(), or load it without streaming."
        )
    while hasattr(batches, "batch_sampler"):  # accelerate's shard of each process
        batches = batches.batch_sampler
    base = getattr(batches, "sampler", None)
    if base is None:
        raise ValueError(
            f"the dataloader's {type(batches).__name__} has no sampler to steer: use train_sampling_strategy='random', "
            "'sequential' or 'group_by_length'."
        )
    if isinstance(base, SteeredSampler):
        raise ValueError("another callback steers this dataloader already: use one callback of selection or order.")
    batches.sampler = SteeredSampler(base, len(base))
    return batches


def largest_over_processes(value: int, args: TrainingArguments) -> int:
    """The largest of all processes' values."""
    if args.world_size == 1 or not torch.distributed.is_initialized():
        return value
    tensor = torch.tensor([value], device=args.device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return int(tensor.item())


@contextmanager
def undisturbed() -> Iterator[None]:
    """Random states are inside as they like and outside as they were, so that training goes on as without us."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{step}"


def _batch_draws(dataloader: Any) -> int:
    """Draws of one step of the dataloader over all processes."""
    total = getattr(dataloader, "total_batch_size", None)
    return int(dataloader.batch_size if total is None else total)


def _under(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
