"""The Trainer of `hf-efficiency finetune`: TRL's SFTTrainer, with checkpoints that a killed run goes on from."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from hf_efficiency.cli.finetune_data import turns

if TYPE_CHECKING:
    import argparse

    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from hf_efficiency.cli.finetune_data import Row, TrainingData

_OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw-8bit": "adamw_bnb_8bit",
    "paged-adamw": "paged_adamw_32bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
_MARKS = 10  # lines of progress where there is no terminal
_SETTINGS = "settings.json"


def world_size() -> int:
    """Processes that train together, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def check_libraries() -> None:
    """ImportError with what to install where TRL or datasets is missing."""
    from importlib.util import find_spec

    missing = [name for name in ("peft", "trl", "datasets") if find_spec(name) is None]
    if missing:
        raise ImportError(f"finetune needs {', '.join(missing)}: pip install 'hf_efficiency[peft,trl]'")


def micro_batch(args: argparse.Namespace) -> tuple[int, int]:
    """(sequences that a process runs at a time, how many such rounds make a step).

    Raises:
        ValueError: They don't divide the batch.
    """
    for option in ("batch_size", "seq_len", "eval_rows"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} {getattr(args, option)}: it must be at least 1")
    if args.max_steps is not None and args.max_steps < 1:
        raise ValueError(f"--max-steps {args.max_steps}: it must be at least 1")
    if not (args.epochs > 0 and args.learning_rate > 0):
        raise ValueError(f"--epochs {args.epochs} and --learning-rate {args.learning_rate} must be above 0")
    processes = world_size()
    size = args.micro_batch or max(1, args.batch_size // processes)
    if size < 1 or args.batch_size % (size * processes):
        raise ValueError(
            f"--batch-size {args.batch_size} is no multiple of {processes} processes of {size} sequences: choose sizes "
            "that divide it (--micro-batch)"
        )
    return size, args.batch_size // (size * processes)


def check_optimizer(name: str, device: str) -> None:
    """Tries the optimizer on a small tensor, before anything long begins.

    Raises:
        ImportError: bitsandbytes is missing.
        ValueError: It has no such optimizer for the device.
    """
    if name.startswith("paged") and not device.startswith("cuda"):
        raise ValueError(f"--optimizer {name}: paging moves states off a GPU, and this runs on the {device}; "
                         "adamw-8bit saves as much there")  # fmt: skip
    if "8bit" not in name and not name.startswith("paged"):
        return
    try:
        optim = importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise ImportError(f"--optimizer {name} is bitsandbytes': pip install bitsandbytes, or take adamw") from error
    weight = torch.nn.Parameter(torch.zeros(8192, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        (optim.AdamW8bit if "8bit" in name else optim.AdamW)([weight]).step()
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        raise ValueError(f"--optimizer {name}: bitsandbytes has none for {device} ({error}); take adamw") from error


def build_trainer(
    args: argparse.Namespace,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    device: str,
    *,
    bf16: bool,
    packing: bool,
    callbacks: list[TrainerCallback],
) -> Any:
    """The trainer, its data tokenized, packed and masked by TRL.

    Raises:
        ValueError: No row is left to train on or to measure.
    """
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    train, held_out, masks = _rows(args, data, tokenizer)
    config = _sft_config(args, data, device, bf16=bf16, packing=packing, masks=masks)
    trainer = _trainer_class()(
        model,
        args=config,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=tokenizer,
        callbacks=[*callbacks, Progress()],
        optimizer_cls_and_kwargs=_galore(model, config),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    for name, dataset in (("data", trainer.train_dataset), ("held-out data", trainer.eval_dataset)):
        if not len(dataset):
            raise ValueError(f"no row of the {name} is left: after {args.seq_len} tokens (--seq-len) none has a token "
                             "to learn")  # fmt: skip
    return trainer


def _sft_config(
    args: argparse.Namespace, data: TrainingData, device: str, *, bf16: bool, packing: bool, masks: dict[str, Any]
) -> Any:
    """TRL's arguments for what was typed; `masks` are those that say which tokens are learned."""
    size, rounds = micro_batch(args)
    return importlib.import_module("trl").SFTConfig(
        str(resume_folder(args)),
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        gradient_accumulation_steps=rounds,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        learning_rate=args.learning_rate,
        lr_scheduler_type=_SCHEDULES[args.schedule],
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        optim=_OPTIMIZERS[args.optimizer],
        bf16=bf16,
        use_cpu=device == "cpu",
        gradient_checkpointing=False,  # `prepare_for_training` has turned it on where it is wanted
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # packed weights never change
        seed=args.seed,
        data_seed=args.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 1,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        max_length=args.seq_len,
        packing=packing,
        # One running text is cut where a sequence is full; rows are kept whole, and apart from each other.
        packing_strategy="wrapped" if data.document else "bfd_split" if data.kind == "text" else "bfd",
        **masks,
    )


def _galore(model: PeftModel, config: Any) -> Any:
    """The optimizer of a model with a GaLoreConfig; None for others, whose optimizer the Trainer makes."""
    if not hasattr(model, "galore_settings"):
        return None
    from hf_efficiency.integrations.transformers.galore import galore

    return galore(model, args=config)


def _rows(
    args: argparse.Namespace, data: TrainingData, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Row], list[Row], dict[str, bool]]:
    """Training and held-out rows, and the masks that TRL is asked for."""
    if args.loss_on == "all" or data.kind == "text":
        return data.train, data.held_out, {"completion_only_loss": False}
    if data.kind != "chat":
        return data.train, data.held_out, {"completion_only_loss": True}
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    try:
        marked = has_generation_markers(tokenizer.chat_template) or get_training_chat_template(tokenizer) is not None
    except ValueError:  # a template that TRL does not know
        marked = False
    if marked:
        return data.train, data.held_out, {"assistant_only_loss": True}
    return turns(data.train), turns(data.held_out), {"completion_only_loss": True}


def _trainer_class() -> Any:
    from peft import load_peft_weights, set_peft_model_state_dict

    trainer: Any = importlib.import_module("trl").SFTTrainer

    class _Trainer(trainer):
        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            # The stock way makes the adapter anew, which types that learn a prompt refuse.
            target = model if model is not None else self.model
            set_peft_model_state_dict(target, load_peft_weights(resume_from_checkpoint, device="cpu"))

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """None in checkpoints: the card is made from the report at the end."""

    return _Trainer


class Progress(TrainerCallback):
    """A bar on a terminal, ten lines elsewhere."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shows where the training begins."""
        if is_main():
            hidden = not sys.stderr.isatty()
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=hidden)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Shows the loss of a step."""
        if self._bar is None or not logs or "loss" not in logs:
            return
        loss, step = float(logs["loss"]), state.global_step
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self._bar.update(step - self._bar.n if not self._bar.disable else 0)
        if self._bar.disable and (step == state.max_steps or step % max(1, state.max_steps // _MARKS) == 0):
            print(f"step {step} of {state.max_steps}, loss {loss:.4f}", file=sys.stderr, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()


@torch.no_grad()
def held_out_loss(trainer: Any, rows: int) -> tuple[float, int]:
    """Mean negative log-likelihood of a held-out token (nats), and how many tokens that is, over the first `rows`."""
    model, collate = trainer.model, trainer.data_collator
    dataset = trainer.eval_dataset.select(range(min(rows, len(trainer.eval_dataset))))
    mode, total, count = model.training, 0.0, 0
    model.eval()
    for row in dataset:
        batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in collate([row]).items()}
        labels = batch.pop("labels")[0, 1:]
        with trainer.compute_loss_context_manager():
            logits = model(**batch, use_cache=False).logits[0]
        # Types that put virtual tokens before the sequence have logits for these too.
        logits = logits[-labels.shape[0] - 1 : -1].float()
        total += F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
        count += int((labels != -100).sum())
    model.train(mode)
    return (total / count if count else math.nan), count


def optimizer_bytes(trainer: Any) -> int:
    """Bytes of the optimizer's state."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))


def resume_folder(args: argparse.Namespace) -> Path:
    """Where checkpoints lie while a run lasts."""
    out = Path(args.output).absolute()
    return out.with_name(f"{out.name}.resume")


def checkpoint_to_resume(args: argparse.Namespace, settings: dict[str, Any]) -> str | None:
    """The last whole checkpoint of an interrupted run, or None.

    Raises:
        ValueError: There is an interrupted run and `--resume` is off, or it had other settings.
    """
    folder = resume_folder(args)
    file = folder / _SETTINGS
    if not file.is_file():
        return None
    if not args.resume:
        if args.overwrite:
            return None
        raise ValueError(f"an interrupted run lies in {folder}: go on with it (--resume), or start anew (--overwrite)")
    before, now = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    changed = next((name for name in {**before, **now} if before.get(name) != now.get(name)), None)
    if changed is not None:
        raise ValueError(
            f"--resume: the interrupted run had {changed} {before.get(changed)!r}, now it is {now.get(changed)!r}: "
            "give what was given then, or start anew (--overwrite without --resume)"
        )
    whole = [path for path in folder.glob("checkpoint-*") if _is_whole(path)]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def note_settings(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Begins a folder for checkpoints, with what a run that resumes must have in common with this one."""
    folder = resume_folder(args)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _is_whole(checkpoint: Path) -> bool:
    """Whether the last file that the Trainer writes is there, and says what it should."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        bool(state["global_step"] == int(checkpoint.name.rpartition("-")[2]))
        and (checkpoint / "optimizer.pt").is_file()
    )
