"""The arguments of `DistillTrainer`."""

import math
from dataclasses import dataclass, field
from typing import Any

from hf_efficiency.distillation.attention import ATTENTION_LOSSES
from hf_efficiency.distillation.features import HIDDEN_LOSSES
from hf_efficiency.distillation.losses import Objective
from transformers import TrainingArguments


@dataclass
class DistillConfig(TrainingArguments):
    """`TrainingArguments` and what is distilled, how, and from whom.

    Attributes:
        divergence: Of the student's next-token distribution from the teacher's: `"forward_kl"`, `"reverse_kl"`,
            `"jsd"` (GKD's, with `beta`), `"skew_kl"`, `"skew_reverse_kl"` (DistiLLM's, with `skew`),
            `"total_variation"`, or several with their weights, as `{"forward_kl": 0.5, "reverse_kl": 0.5}`.
        beta: Of the JSD; 0 is the forward KL and 1 the reverse.
        skew: Share of the other distribution in a skew divergence.
        temperature: Of both distributions. The soft loss is multiplied by its square (Hinton et al. 2015).
        alpha: Weight of the soft loss; that of the cross-entropy with the labels is 1 - alpha.
        hidden_weight: Weight of the distance of hidden states; 0: not computed.
        hidden_loss: `"cosine"`, `"mse"`, or `"normalized_mse"` (relative to the teacher's, token by token).
        layer_map: `"uniform"`, `"last"`, `"last-k"`, `"similarity"` (by centred kernel alignment on the first batch),
            or pairs (student block, teacher block), counted from 0.
        projection_learning_rate: Of the projections between hidden sizes; None: the model's.
        attention_weight: Weight of the distance of attention maps; 0: not computed. Both models must be loaded with
            `attn_implementation="eager"`.
        attention_loss: `"kl"` or `"mse"`.
        attention_map: Which blocks' attention is matched, as `layer_map`.
        lmbda: Share of batches whose text the student writes itself (GKD), from 0 to 1.
        seq_kd: In all other batches the teacher writes the text (sequence-level distillation).
        max_new_tokens: Of a text that a model writes.
        sampling_temperature: Of the writing; 0: the most likely token.
        prompt_length: Tokens that a text is begun with where the labels leave none out as a prompt.
        ema_decay: The teacher is the running average of the student with this decay, and no other is given.
        teacher_starts: For a chain of teachers: the share of the training at which each takes over, from 0 on; None:
            each has the same part.
        teacher_device: Where the teacher goes, such as `"cpu"` or `"cuda:1"`; None: to the student's device, but a
            quantized one, or one spread by a device map, stays where it is.
        teacher_init_kwargs: For `from_pretrained`, where teachers are given by name.
        vocab_size: How many logits, from the first on, student and teacher share; None: find out.
        chunked: Never hold the logits of all tokens.
        chunk_rows: Tokens of a chunk; None: by the size of the vocabulary.
        monitor: Log how close the student is to the teacher: on steps that are logged, and in evaluation.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012  # as the base class has it
        *TrainingArguments._VALID_DICT_FIELDS,
        *("teacher_init_kwargs", "divergence", "layer_map", "attention_map"),
    ]

    divergence: dict[str, float] | str | None = field(
        default="forward_kl", metadata={"help": "a divergence, or several with weights"}
    )
    beta: float = field(default=0.5, metadata={"help": "of the JSD"})
    skew: float = field(default=0.1, metadata={"help": "of the skew divergences"})
    temperature: float = field(default=1.0, metadata={"help": "of both distributions"})
    alpha: float = field(default=1.0, metadata={"help": "weight of the soft loss; 1 - alpha is that of the hard loss"})
    hidden_weight: float = field(default=0.0, metadata={"help": "weight of the hidden states' distance"})
    hidden_loss: str = field(default="cosine", metadata={"help": "cosine, mse or normalized_mse"})
    layer_map: dict[int, int] | str | None = field(
        default="uniform", metadata={"help": "uniform, last, last-k, similarity, or pairs"}
    )
    projection_learning_rate: float | None = field(default=None, metadata={"help": "default: the model's"})
    attention_weight: float = field(default=0.0, metadata={"help": "weight of the attention maps' distance"})
    attention_loss: str = field(default="kl", metadata={"help": "kl or mse"})
    attention_map: dict[int, int] | str | None = field(default="last-1", metadata={"help": "as layer_map"})
    lmbda: float = field(default=0.0, metadata={"help": "share of batches that the student writes"})
    seq_kd: bool = field(default=False, metadata={"help": "the teacher writes the other batches"})
    max_new_tokens: int = field(default=128, metadata={"help": "of a text that a model writes"})
    sampling_temperature: float = field(default=1.0, metadata={"help": "of the writing"})
    prompt_length: int = field(default=32, metadata={"help": "of prompts where labels mark none"})
    ema_decay: float | None = field(default=None, metadata={"help": "the teacher is the student's running average"})
    teacher_starts: list[float] | None = field(default=None, metadata={"help": "of a chain of teachers"})
    teacher_device: str | None = field(default=None, metadata={"help": "where the teacher goes"})
    teacher_init_kwargs: dict[str, Any] | str | None = field(default=None, metadata={"help": "for from_pretrained"})
    vocab_size: int | None = field(default=None, metadata={"help": "logits that both share"})
    chunked: bool = field(default=True, metadata={"help": "never hold the logits of all tokens"})
    chunk_rows: int | None = field(default=None, metadata={"help": "tokens of a chunk"})
    monitor: bool = field(default=True, metadata={"help": "log how close the student is to the teacher"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layer_map", "attention_map"):  # JSON has no whole numbers for keys
            value = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, {int(student): int(teacher) for student, teacher in value.items()})
        self.objective()
        for name in ("hidden_weight", "attention_weight", "sampling_temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0.")
        for name in ("max_new_tokens", "prompt_length", "chunk_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if not 0 <= self.lmbda <= 1:
            raise ValueError(f"lmbda={self.lmbda} must be from 0 (the data's texts) to 1 (the student's own).")
        for name, known in (("hidden_loss", HIDDEN_LOSSES), ("attention_loss", ATTENTION_LOSSES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(known)}.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be at least 0 and below 1.")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor has no part in distillation: leave it at 0.")
        starts = self.teacher_starts
        if starts is not None and (not starts or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= 1):
            raise ValueError(f"teacher_starts={starts} must begin with 0, rise, and stay below 1.")

    def objective(self) -> Objective:
        """The loss over logits.

        Raises:
            ValueError: A field of it is out of its range.
        """
        return Objective(self.divergence or "forward_kl", self.beta, self.skew, self.temperature, self.alpha)
