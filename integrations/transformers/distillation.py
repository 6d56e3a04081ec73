"""`DistillTrainer`: transformers' Trainer with a teacher.

Shape legend: b batch, t tokens, n rows (tokens with a label), d features, L matched pairs of blocks.
"""

import functools
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficiency.distillation.attention import attention_loss
from hf_efficiency.distillation.chunked import Job, chunked_loss
from hf_efficiency.distillation.features import FeatureLoss
from hf_efficiency.distillation.heads import LogitsHead, OutputHead
from hf_efficiency.distillation.layer_map import LayerMap, cka, resolve_layer_map
from hf_efficiency.distillation.losses import Objective
from hf_efficiency.distillation.sampling import continue_prompts, prompts_of
from hf_efficiency.distillation.teacher_cache import TeacherCache
from hf_efficiency.distillation.teachers import CachedTeacher, ModelTeacher
from hf_efficiency.distillation.trace import Trace, decoder_blocks, trace
from hf_efficiency.distillation.vocabulary import shared_vocabulary
from hf_efficiency.evaluation.metrics import evaluating
from hf_efficiency.integrations.transformers.distillation_config import DistillConfig
from hf_efficiency.integrations.transformers.distillation_data import (
    DistillCollator,
    completed,
    inputs_of,
    valid_positions,
)
from hf_efficiency.integrations.transformers.distillation_monitor import Monitor
from hf_efficiency.integrations.transformers.distillation_state import load_state, save_state
from hf_efficiency.integrations.transformers.distillation_teachers import Teachers
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

logger = logging.getLogger(__name__)

_CHECKED_ROWS = 256  # rows of a dataset that are looked up in a cache before training
_PROBE_ROWS, _PROBE_TOKENS = 8, 512  # of the data, that layers are compared on


class DistillTrainer(Trainer):
    """Trains a student towards a teacher; all else is transformers' `Trainer`.

    The loss is summed over the tokens that have labels and divided by their number in the whole batch, over all
    accumulation steps and processes, as `Trainer` does. The log gains `student_perplexity`, `teacher_kl`,
    `top1_agreement`, `expected_acceptance` (the chance that the teacher accepts a token drafted by the student), and
    `alignment_error_S_T` for each matched pair of blocks; evaluation reports the same with its prefix.

    Args:
        model: The student: any causal language model, a PEFT model, one with quantized weights.
        teacher_model: A causal language model, its name or folder, a `TeacherCache`, or a list of these, which teach
            one after the other (see `teacher_starts`). None with `ema_decay`: the student's running average.
        args: A `DistillConfig`.
        data_collator: By default rows are padded on the right, and all their tokens are labels if they have none.
        processing_class: The student's tokenizer, as in `Trainer`.
        teacher_processing_class: The teacher's tokenizer, to compare them. A teacher given by name brings its own.
        **kwargs: Of `Trainer`.

    Raises:
        ValueError: Settings that contradict each other, models whose vocabularies differ, a cache of other data or
            another tokenizer, an empty dataset.
        TypeError: `args` is no `DistillConfig`, or the teacher is none.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any = None,
        teacher_model: Any = None,
        args: DistillConfig | None = None,
        data_collator: Any = None,
        *,
        processing_class: Any = None,
        teacher_processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        args = DistillConfig() if args is None else args
        if not isinstance(args, DistillConfig):
            raise TypeError(f"args is a {type(args).__name__}: DistillTrainer takes a DistillConfig.")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func has no part here: the loss is that of the DistillConfig.")
        dataset: Any = kwargs.get("train_dataset")
        if hasattr(dataset, "__len__") and not len(dataset):
            raise ValueError("train_dataset is empty: there is nothing to distil on.")
        if data_collator is None:
            pad = getattr(processing_class, "pad_token_id", None)
            data_collator = DistillCollator(0 if pad is None else pad)
        super().__init__(model, args, data_collator, processing_class=processing_class, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError("Several GPUs in one process are not supported: start with torchrun or accelerate launch.")
        self.args: DistillConfig
        self.objective: Objective = args.objective()
        self.teachers = Teachers(teacher_model, args, self._student, args.device)
        self.teacher_processing_class = teacher_processing_class
        self.features: FeatureLoss | None = None
        self.monitor = Monitor()
        self._plain_student: bool | None = None
        self._wants_logits = False
        self._vocab: dict[int, int] = {}
        self._check_before_training()
        self.add_callback(_AfterStep(self))

    # Checks.

    def _check_before_training(self) -> None:
        given = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval_dataset": self.eval_dataset}
        for cache in (one for one in self.teachers.chain if isinstance(one, TeacherCache)):
            if self.processing_class is not None:
                cache.check_tokenizer(self.processing_class)
            for name, dataset in {"train_dataset": self.train_dataset, **given}.items():
                if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
                    step = max(1, len(dataset) // _CHECKED_ROWS)
                    rows = (self._collated([dataset[i]]) for i in range(0, len(dataset), step))
                    cache.check_data((row["input_ids"][row["attention_mask"].bool()] for row in rows), name)
        self._shared_vocabulary(self.teacher)
        if self.args.attention_weight:
            for who, model in (("student", self._student), ("teacher", self.teacher.model)):
                if model.config._attn_implementation != "eager":
                    raise ValueError(
                        f"attention_weight needs attention maps, which the {who} does not compute: load it with "
                        f"attn_implementation='eager' (it has {model.config._attn_implementation!r})."
                    )
        self.attention_map = self._layer_map(self.args.attention_map) if self.args.attention_weight else ()
        if self.args.hidden_weight and self.args.layer_map != "similarity":
            self._layer_map(self.args.layer_map)

    def _shared_vocabulary(self, teacher: ModelTeacher | CachedTeacher) -> int:
        """Columns of the logits that student and teacher share; found once for each teacher."""
        index = self.teachers.index
        if index not in self._vocab:
            size = OutputHead(self._student).size
            other = self.teacher_processing_class or self.teachers.tokenizer()
            asked = (size, teacher.vocab_size, self.processing_class, other, self.args.vocab_size)
            self._vocab[index] = shared_vocabulary(*asked)
        return self._vocab[index]

    # Who takes part.

    @property
    def _student(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @property
    def teacher(self) -> Any:
        """Who teaches at this point of the training."""
        return self.teachers.at(self.state.global_step / max(1, self.state.max_steps))

    def _layer_map(self, given: Any) -> LayerMap:
        ours, theirs = (len(decoder_blocks(model)) for model in (self._student, self.teacher.model))
        similarity = self._similarity(ours, theirs) if given == "similarity" else None
        return resolve_layer_map(given, ours, theirs, similarity)

    def _similarity(self, student_layers: int, teacher_layers: int) -> Tensor:
        """How alike blocks are (student, teacher), on the first rows of the data, the same in every process."""
        if self.train_dataset is None:
            raise ValueError("layer_map='similarity' needs a train_dataset.")
        dataset: Any = self.train_dataset
        rows = (dataset[i] for i in range(len(dataset))) if hasattr(dataset, "__len__") else iter(dataset)
        batch = self._prepare_inputs(self._collated(list(islice(rows, _PROBE_ROWS))))
        valid = valid_positions(batch)
        inputs = inputs_of(batch)
        with evaluating(self._student):
            found = trace(self._student, inputs, layers=range(student_layers))
        theirs = self.teacher.answer(inputs, valid, layers=range(teacher_layers)).states
        ours = [found.states[i][:, :-1][valid][:_PROBE_TOKENS] for i in range(student_layers)]
        return cka(ours, [theirs[i][:_PROBE_TOKENS] for i in range(teacher_layers)])

    def _collated(self, rows: list[Any]) -> dict[str, Any]:
        collate = self._get_collator_with_removed_columns(self.data_collator)
        return completed(collate([dict(row) for row in rows]))

    # Batches.

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The batches of one optimizer step, in which texts that a model is to write are written already."""
        batches = [completed(batch) for batch in islice(epoch_iterator, num_batches)]
        if self.args.lmbda or self.args.seq_kd:
            batches = [self._rewritten(batch, i) for i, batch in enumerate(batches)]
        return batches, self._get_num_items_in_batch(batches, device)

    def _rewritten(self, batch: dict[str, Any], micro_step: int) -> dict[str, Any]:
        """The batch, or what student or teacher makes of its prompts; the same again when training is resumed."""
        seed = (self.args.seed * 1_000_003 + self.state.global_step) * 1_009 + micro_step
        drawn = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()  # alike in all processes
        if drawn < self.args.lmbda:
            writer = self._student
        elif self.args.seq_kd:
            writer = self.teacher.model
        else:
            return batch
        if "prompts" in batch:
            pairs = zip(batch["prompts"], batch["prompt_attention_mask"].bool(), strict=True)
            prompts = [ids[mask] for ids, mask in pairs]
        else:
            prompts = prompts_of(batch["input_ids"], batch["attention_mask"], batch["labels"], self.args.prompt_length)
        written = continue_prompts(
            writer,
            prompts,
            max_new_tokens=self.args.max_new_tokens,
            temperature=self.args.sampling_temperature,
            seed=seed + 7_919 * self.args.process_index,
            pad_token_id=getattr(self.processing_class, "pad_token_id", None) or 0,
        )
        return dict(written)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Tokens with a label in all batches, and in all processes if `average_tokens_across_devices`."""
        count = torch.zeros((), dtype=torch.long, device=device)
        for batch in batch_samples:
            count += valid_positions(completed(batch)).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    # The loss.

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective, and what the `DistillConfig` adds to it, per token with a label."""
        batch = completed(inputs)
        valid = valid_positions(batch)
        tokens = valid.sum() if num_items_in_batch is None else num_items_in_batch
        share = num_items_in_batch is not None and self.args.average_tokens_across_devices
        scale = (self.accelerator.num_processes if share else 1) / torch.as_tensor(tokens).clamp(min=1).to(valid.device)
        total, logits = self._loss_of(model, batch, valid, whole=return_outputs and self._wants_logits)
        loss = total * scale
        return (loss, {"loss": loss} | ({} if logits is None else {"logits": logits})) if return_outputs else loss

    def _loss_of(
        self, model: Any, batch: dict[str, Any], valid: Tensor, *, whole: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The loss summed over tokens, and the logits (b, t, V) if they are wanted."""
        args = self.args
        inputs = inputs_of(batch)
        watched = args.monitor and (not model.training or self._step_is_logged())
        matched: LayerMap = self.features.layer_map if self.features is not None else ()
        answer = None
        if args.alpha > 0 or watched or matched or self.attention_map:
            layers, maps = {t for _, t in matched}, {t for _, t in self.attention_map}
            answer = self.teacher.answer(inputs, valid, layers, maps)
        found = self._traced(model, inputs, matched, whole=whole)
        held = whole or not self._chunks()
        head = LogitsHead() if held else OutputHead(self._student)
        rows = (found.logits if held else found.hidden)[:, :-1][valid]
        soft = answer is not None and (args.alpha > 0 or watched)
        job = Job(
            self.objective,
            batch["labels"][:, 1:][valid],
            answer.rows if answer is not None and soft else None,
            self._shared_vocabulary(self.teacher) if soft else found.logits.shape[-1],
            args.chunk_rows,
            watched,
        )
        total, sums = chunked_loss(job, head, rows)
        sums["tokens"] = valid.sum()
        if answer is not None and matched and self.features is not None:
            ours = {s: found.states[s][:, :-1][valid] for s, _ in matched}
            feature, errors = self.features(ours, answer.states)
            total = total + args.hidden_weight * feature
            sums |= {"hidden": feature.detach()} | {
                f"error_{s}_{t}": e for (s, t), e in zip(matched, errors, strict=True)
            }
        if answer is not None and self.attention_map:
            queries = nn.functional.pad(valid, (0, 1))
            pairs = [(found.attentions[s], answer.attentions[t]) for s, t in self.attention_map]
            maps_loss = torch.stack([attention_loss(s, t, queries, args.attention_loss) for s, t in pairs]).mean()
            total = total + args.attention_weight * maps_loss
            sums["attention"] = maps_loss.detach()
        self.monitor.add(sums, training=model.training)
        return total, found.logits if whole else None

    def _traced(self, model: Any, inputs: dict[str, Any], matched: LayerMap, *, whole: bool) -> Trace:
        maps = {s for s, _ in self.attention_map}
        run = functools.partial(
            trace, self._student, inputs, layers={s for s, _ in matched}, attentions=maps, call=model
        )
        found = run(full_logits=whole or not self._chunks())
        if self._plain_student is None and self._chunks():
            head = OutputHead(self._student)
            self._plain_student = head.agrees(found.hidden[:, :1], found.logits[:, :1])
            if not self._plain_student:
                logger.warning("The student's logits are no plain function of its head: they are held whole.")
                found = run(full_logits=True)
        return found

    def _chunks(self) -> bool:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return self.args.chunked and self._plain_student is not False and not sharded

    def _step_is_logged(self) -> bool:
        every = self.state.logging_steps
        return self.args.logging_strategy != "steps" or not every or (self.state.global_step + 1) % every == 0 or (
            self.args.logging_first_step and self.state.global_step == 0
        )  # fmt: skip

    # Training and its state.

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of `Trainer`, with the projections as a group of their own."""
        optimizer = super().create_optimizer(model)
        if not self.args.hidden_weight:
            return optimizer
        if self.features is None:
            d_s, d_t = (m.config.get_text_config().hidden_size for m in (self._student, self.teacher.model))
            layer_map, args = self._layer_map(self.args.layer_map), self.args
            self.features = FeatureLoss(layer_map, d_s, d_t, args.hidden_loss, args.seed).to(args.device)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        fresh = [p for p in self.features.parameters() if id(p) not in known]
        if fresh:
            rate = self.args.projection_learning_rate
            optimizer.add_param_group({"params": fresh, "weight_decay": 0.0} | ({} if rate is None else {"lr": rate}))
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch. The projections lie outside the wrapped model, so their gradients are averaged here."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.features is not None and self.accelerator.sync_gradients and self.args.world_size > 1:
            for parameter in self.features.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """As in `Trainer`; logits are made whole only where they are asked for."""
        self._wants_logits = not prediction_loss_only
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in `Trainer`, with the measures of closeness among the metrics."""
        self.monitor.drop(training=False)
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        found = self.monitor.take(self.accelerator, training=False)
        metrics = {**(output.metrics or {}), **{f"{prefix}_{name}": value for name, value in found.items()}}
        return output._replace(metrics=metrics)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the measures of closeness to the training log."""
        if "loss" in logs:
            logs = {**logs, **self.monitor.take(self.accelerator, training=True)}
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_state(Path(output_dir), self.features, self.teachers.ema)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_state(Path(checkpoint), self.features, self.teachers.ema, fixed=self.args.layer_map != "similarity")


class _AfterStep(TrainerCallback):
    """What an optimizer step is followed by: the average moves, the projections' gradients go."""

    def __init__(self, trainer: DistillTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer.teachers.ema is not None:
            self._trainer.teachers.ema.update()
        if self._trainer.features is not None:
            self._trainer.features.zero_grad()
