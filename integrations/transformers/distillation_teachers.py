"""From what the user calls a teacher to one that answers: a model, its name, a cache, an average, a chain."""

import gc
from typing import Any

import torch
from torch import nn

from hf_efficiency.distillation.ema import EMATeacher
from hf_efficiency.distillation.teacher_cache import TeacherCache
from hf_efficiency.distillation.teachers import CachedTeacher, ModelTeacher
from hf_efficiency.integrations.transformers.distillation_config import DistillConfig
from transformers import AutoModelForCausalLM, AutoTokenizer


class Teachers:
    """One teacher or a chain of them, of which one teaches at a time.

    Args:
        given: A model, a name or folder for `from_pretrained`, a `TeacherCache`, a list of these, or None for the
            student's running average.
        args: The trainer's.
        student: For the average.
        device: The student's.

    Raises:
        ValueError: No teacher and no `ema_decay`, or both; settings that this kind of teacher can't serve.
        TypeError: Something that is no teacher.
    """

    def __init__(self, given: Any, args: DistillConfig, student: nn.Module, device: torch.device) -> None:
        self.args, self.device = args, device
        self.ema: EMATeacher | None = None
        if given is None:
            if args.ema_decay is None:
                raise ValueError(
                    "There is no teacher: pass teacher_model=, or set ema_decay for the student's average."
                )
            self.ema = EMATeacher(student, args.ema_decay)
            given = self.ema.model
        elif args.ema_decay is not None:
            raise ValueError(
                "Both teacher_model and ema_decay are given: with ema_decay the student is its own teacher."
            )
        self.chain = list(given) if isinstance(given, (list, tuple)) else [given]
        for one in self.chain:
            if not isinstance(one, (nn.Module, str, TeacherCache)):
                raise TypeError(
                    f"A teacher is a {type(one).__name__}; give a model, its name or folder, or a TeacherCache."
                )
        self._check(student)
        self.index = 0
        self._current: ModelTeacher | CachedTeacher | None = None

    def _check(self, student: nn.Module) -> None:
        args = self.args
        if not self.chain:
            raise ValueError("The chain of teachers is empty.")
        trained = {id(p) for p in student.parameters() if p.requires_grad}
        for one in (one for one in self.chain if isinstance(one, nn.Module)):
            if any(id(p) in trained for p in one.parameters()):
                raise ValueError(
                    "The teacher shares trained weights with the student: pass a copy (copy.deepcopy), or no teacher "
                    "and ema_decay, so that the student's average teaches."
                )
        starts = args.teacher_starts
        if starts is not None and len(starts) != len(self.chain):
            raise ValueError(f"teacher_starts has {len(starts)} entries for {len(self.chain)} teachers.")
        if len(self.chain) > 1 and (args.hidden_weight or args.attention_weight):
            raise ValueError(
                "hidden_weight and attention_weight match the blocks of one teacher; train with a chain of several in "
                "one run for each."
            )
        for cache in (one for one in self.chain if isinstance(one, TeacherCache)):
            if args.hidden_weight or args.attention_weight:
                raise ValueError(
                    "hidden_weight and attention_weight need the teacher itself: a teacher cache holds neither hidden "
                    "states nor attention maps."
                )
            if args.lmbda or args.seq_kd:
                raise ValueError("lmbda and seq_kd need the teacher itself: a cache can't judge or write new text.")
            if cache.temperature != args.temperature:
                raise ValueError(
                    f"The teacher cache was made at temperature {cache.temperature}, training asks for "
                    f"{args.temperature}: make the cache at that temperature, or train at the cache's."
                )

    @property
    def starts(self) -> list[float]:
        """The share of the training at which each takes over."""
        return self.args.teacher_starts or [i / len(self.chain) for i in range(len(self.chain))]

    def at(self, progress: float) -> ModelTeacher | CachedTeacher:
        """Who teaches at this share of the training. A teacher given by name is loaded now and dropped afterwards."""
        index = max(i for i, start in enumerate(self.starts) if start <= progress or i == 0)
        if self._current is None or self.index != index:
            if self._current is not None:  # two teachers may not fit
                self._current = None
                gc.collect()
            self.index, self._current = index, self._ready(self.chain[index])
        return self._current

    def _ready(self, one: Any) -> ModelTeacher | CachedTeacher:
        if isinstance(one, TeacherCache):
            return CachedTeacher(one)
        if isinstance(one, str):
            one = AutoModelForCausalLM.from_pretrained(one, **self._loading())
        place = self.args.teacher_device or (None if _stays(one) else self.device)
        if one is not getattr(self.ema, "model", None):
            for parameter in one.parameters():
                parameter.requires_grad_(False)
            if place is not None:
                one = one.to(place)
        return ModelTeacher(one)

    def _loading(self) -> dict[str, Any]:
        given = self.args.teacher_init_kwargs or {}
        if isinstance(given, str):
            raise TypeError(f"teacher_init_kwargs={given!r} is no mapping.")
        return given

    def tokenizer(self) -> Any:
        """The tokenizer beside the present teacher, if that was given by name."""
        one = self.chain[self.index]
        return AutoTokenizer.from_pretrained(one) if isinstance(one, str) else None


def _stays(model: Any) -> bool:
    """Whether a model has a place already that must not be changed."""
    return bool(getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False))
