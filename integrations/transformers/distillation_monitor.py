"""Running sums of what `DistillTrainer` logs."""

import math
from typing import Any

import torch
from torch import Tensor

# Name of a sum: its name in the log.
_MEANS = {
    "soft": "soft_loss",
    "hard": "hard_loss",
    "kl": "teacher_kl",
    "agreement": "top1_agreement",
    "acceptance": "expected_acceptance",
    "hidden": "hidden_loss",
    "attention": "attention_loss",
}


class Monitor:
    """Sums over tokens, of training and of evaluation, until they are logged.

    A quantity that is measured on some batches only is averaged over the tokens of these.
    """

    def __init__(self) -> None:
        self._sums: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}

    def add(self, sums: dict[str, Tensor], *, training: bool) -> None:
        """Takes the sums () of a batch; `tokens` among them is their number."""
        tokens = sums["tokens"].double()
        store = self._sums[training]
        for name, value in sums.items():
            if name != "tokens":
                pair = torch.stack([value.detach().double(), tokens])
                store[name] = pair + store[name] if name in store else pair

    def drop(self, *, training: bool) -> None:
        """Forgets what was added."""
        self._sums[training] = {}

    def take(self, accelerator: Any, *, training: bool) -> dict[str, float]:
        """Means over the tokens of all processes, which forget them."""
        store, self._sums[training] = self._sums[training], {}
        if accelerator.num_processes > 1:
            store = _over_processes(store, accelerator)
        means = {name: float(total / count) for name, (total, count) in sorted(store.items()) if count > 0}
        found = {_MEANS[name]: value for name, value in means.items() if name in _MEANS}
        if "hard" in means:
            found["student_perplexity"] = math.exp(means["hard"]) if means["hard"] < 700 else math.inf
        return found | {f"alignment_{name}": value for name, value in means.items() if name not in _MEANS}


def _over_processes(store: dict[str, Tensor], accelerator: Any) -> dict[str, Tensor]:
    """A process whose batch had no labels lacks some names; the others know them."""
    gathered: list[list[str]] = [[] for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather_object(gathered, sorted(store))
    names = sorted({name for some in gathered for name in some})
    if not names:
        return {}
    nothing = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    table = torch.stack([store.get(name, nothing).to(accelerator.device) for name in names])
    return dict(zip(names, accelerator.reduce(table, "sum").unbind(), strict=True))
