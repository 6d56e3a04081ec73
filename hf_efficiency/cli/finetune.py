"""`hf-efficiency finetune`: train an adapter on a quantized or dense model, measure it, write its model card."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from hf_efficiency import __version__
from hf_efficiency.cli import finetune_adapter as adapter
from hf_efficiency.cli import finetune_training as training
from hf_efficiency.cli.finetune_data import TrainingData, read_data, set_chat_template
from hf_efficiency.cli.models import Source, load_model, load_tokenizer, pick_device, quantization_of, resolve
from hf_efficiency.evaluation import bytes_on_disk, peak_memory
from hf_efficiency.evaluation.finetune_report import FinetuneReport
from hf_efficiency.evaluation.metrics import check_window
from hf_efficiency.saving import check_output, staged_folder

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from peft import PeftConfig, PeftModel

_PLOT = "loss.png"
# Options that change neither data, model nor steps, so that a run may resume with others.
_FREE = {"output", "overwrite", "resume", "traceback", "argv", "module", "save_steps", "device", "data", "eval_data",
         "micro_batch", "eval_rows"}  # fmt: skip


@dataclass
class _Job:
    """Everything that is known before a model is loaded; a wrong argument is found while this is put together."""

    args: argparse.Namespace
    out: Path
    device: str
    data: TrainingData
    quantization: Any
    config: PeftConfig
    packing: bool
    checkpointing: bool
    settings: dict[str, Any]
    checkpoint: str | None


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    job = _prepare(args)
    with resolve(args.model) as source:
        if quantization_of(source.path) is not None and job.quantization is not None:
            raise ValueError(
                f"{args.model!r} is already quantized ({quantization_of(source.path)}): leave --quantize out"
            )
        tokenizer = load_tokenizer(source)
        set_chat_template(tokenizer, job.data, args.chat_template)
        model, dtype = _model(job, source)
        trainer = training.build_trainer(
            args, model, tokenizer, job.data, job.device,
            bf16=dtype == torch.bfloat16, packing=job.packing, callbacks=adapter.callbacks(args),
        )  # fmt: skip
        trainer.accelerator.wait_for_everyone()
        if training.is_main() and job.checkpoint is None:
            training.note_settings(args, job.settings)
        trainer.accelerator.wait_for_everyone()
        # GaLore's adapter is the weights themselves, which are still the base's.
        with nullcontext() if args.peft == "galore" else model.disable_adapter():
            before, tokens = training.held_out_loss(trainer, args.eval_rows)
        trainable, total = adapter.parameters(model)
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=job.checkpoint)
        seconds = time.perf_counter() - start
        after, _ = training.held_out_loss(trainer, args.eval_rows)
        if training.is_main():
            with staged_folder(job.out) as staging:
                model.save_pretrained(str(staging))
                tokenizer.save_pretrained(staging)
                report = FinetuneReport(
                    losses=[float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
                    loss_before=before,
                    loss_after=after,
                    held_out_tokens=tokens,
                    trainable_parameters=trainable,
                    parameters=total,
                    adapter_bytes=bytes_on_disk(staging),
                    optimizer_bytes=training.optimizer_bytes(trainer),
                    peak_memory=peak_memory(job.device),
                    seconds=round(seconds, 2),
                    context=_context(job, source, dtype),
                )
                report.to_json(staging / "report.json")
                report.plot(staging / _PLOT)
                report.to_card(_PLOT).save(staging / "README.md")
            shutil.rmtree(training.resume_folder(args), ignore_errors=True)
            for label, value in report.rows():
                print(f"{label:<40}{value:>24}")
            print(f"\n{job.out}: {args.peft} adapter for {args.model}")
        trainer.accelerator.end_training()
    return 0


def _prepare(args: argparse.Namespace) -> _Job:
    training.check_libraries()
    out = check_output(args.output, overwrite=args.overwrite)
    device = _device(args.device)
    training.micro_batch(args)
    quantization, config = adapter.quantization_config(args), adapter.peft_config(args)
    packing, checkpointing = adapter.packs(args, config), adapter.checkpoints(args, config)
    data = read_data(args.data, args.eval_data)
    args.optimizer = adapter.optimizer_name(args)
    training.check_optimizer(args.optimizer, device)
    settings = {name: value for name, value in vars(args).items() if name not in _FREE}
    settings["data"] = data.description
    checkpoint = training.checkpoint_to_resume(args, settings)
    return _Job(args, out, device, data, quantization, config, packing, checkpointing, settings, checkpoint)


def _device(device: str | None) -> str:
    """The device of this process: with several processes on GPUs, one each."""
    picked = pick_device(device)
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if picked == "cuda" and local is not None else picked


def _model(job: _Job, source: Source) -> tuple[PeftModel, torch.dtype]:
    """The base with its adapter, and the base's dtype."""
    from peft import get_peft_model
    from transformers import AutoConfig, set_seed

    from hf_efficiency import prepare_for_training

    check_window(AutoConfig.from_pretrained(source.path), job.args.seq_len)
    base = load_model(source.path, job.args.dtype, job.device, job.quantization)
    dtype = base.dtype
    if dtype == torch.float16:
        raise ValueError("the checkpoint is in float16, in which gradients underflow: give --dtype bfloat16 or float32")
    prepare_for_training(base, gradient_checkpointing=job.checkpointing)
    set_seed(job.args.seed)
    model = get_peft_model(base, job.config)
    if source.path != job.args.model and source.base_model is not None and job.args.model.endswith(".gguf"):
        model.peft_config["default"].base_model_name_or_path = source.base_model
    return model, dtype


def _context(job: _Job, source: Source, dtype: torch.dtype) -> dict[str, Any]:
    args = job.args
    chosen = {k: v for k, v in job.config.to_dict().items() if v not in (None, {}, False)}
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in chosen.items()}
    fields = ", ".join(f"{name}={value!r}" for name, value in _assigned(args))
    name = source.base_model or args.model
    quantize = ""
    if job.quantization is not None:
        quantize = f", quantization_config=hf_efficiency.{type(job.quantization).__name__}({fields})"
    text = f'base = AutoModelForCausalLM.from_pretrained("{name}", dtype="{_short(dtype)}"{quantize})'
    known = {
        "peft_type": args.peft.upper() if args.peft.islower() else args.peft,
        "base_model": source.base_model,
        "quantization": args.quantize or quantization_of(source.path),
        "load": text,
        "license": source.license,
        "languages": source.languages,
        "data": job.data.description,
        "held_out": args.eval_data or "the last 5 % of it",
        "settings": json.loads(json.dumps(settings, default=str)),
        "command": shlex.join(["hf-efficiency", *args.argv]),
        "device": job.device if job.device != "cpu" else platform.processor() or "cpu",
        "dtype": _short(dtype),
        "processes": training.world_size(),
        "packing": job.packing,
        "gradient_checkpointing": job.checkpointing,
        "versions": {"hf_efficiency": __version__, **{n: version(n) for n in ("torch", "transformers", "peft", "trl")},
                     "python": sys.version.split()[0]},
    }  # fmt: skip
    return {key: value for key, value in known.items() if value is not None}


def _assigned(args: argparse.Namespace) -> list[tuple[str, Any]]:
    from hf_efficiency.cli.configs import parse_assignment

    return [parse_assignment(text) for text in args.quantize_set]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
