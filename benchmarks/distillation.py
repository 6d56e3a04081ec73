"""Distilling a 10-layer student of SmolLM2-135M: memory and time of the loss, and what 30 steps bring.

    PYTHONPATH=. python benchmarks/distillation.py memory --text FILE --output memory.md
    PYTHONPATH=. python benchmarks/distillation.py training --text FILE --output training.md

`memory`: one step at batch 1 x 1024 tokens. The peak of all tensors allocated in forward and backward, above the two
models and the student's gradients, in units of one (tokens x vocabulary) float32 tensor; and CPU seconds of the step.
`training`: 30 steps of 2 x 128 tokens at 5e-4 on the first 80 % of the text; then KL to the teacher and cross-entropy
on 32 windows of 128 tokens of its end. Students are made of ten evenly spaced blocks of the teacher, the first and the
last among them. Each row runs in a process of its own, on one thread, in float32; seconds are CPU seconds of a step.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TOKENS, STEPS, ROWS, WIDTH, RATE, EVALUATED = 1024, 30, 2, 128, 5e-4, 32
BLOCKS = [i * 29 // 9 for i in range(10)]  # 0, 3, 6, 9, 12, 16, 19, 22, 25, 29
MEMORY = [
    *(f"ours beta={b}" for b in (0.0, 0.1, 0.5, 1.0)),
    *("ours monitored", "ours top-64 cache", "body alone"),
    *("naive beta=0.0", "naive beta=0.5", "TRL GKD beta=0.0", "TRL GKD beta=0.5"),
]
TRAINING = {
    "start": None,
    "forward KL": {},
    "cross-entropy alone": {"alpha": 0.0},
    "forward KL and hidden states": {"hidden_weight": 1.0},
    "cached top-64 teacher": {},
    "TRL GKD, beta 0": None,
}


def load() -> tuple[Any, Any]:
    from hf_efficiency.demo import load_demo_model

    torch.set_num_threads(1)
    return load_demo_model(torch.float32)


def token_rows(tokenizer: Any, text: str) -> tuple[Tensor, Tensor]:
    """Training rows (n, WIDTH) of the first 80 % of a text, and evaluation rows of its end."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    train, evaluation = ids[: int(0.8 * len(ids))], ids[-EVALUATED * WIDTH :]
    rows = train[: len(train) // WIDTH * WIDTH].view(-1, WIDTH)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order], evaluation.view(-1, WIDTH)


# Memory.


def naive_loss(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """Everything at once, as one writes it first."""
    q, p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    if beta == 0:
        return F.kl_div(q, p, reduction="batchmean", log_target=True)
    m = torch.logsumexp(torch.stack([p + torch.tensor(beta).log(), q + torch.tensor(1 - beta).log()]), 0)
    of_teacher, of_student = (F.kl_div(m, x, reduction="batchmean", log_target=True) for x in (p, q))
    return beta * of_teacher + (1 - beta) * of_student


def trl_loss(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    labels = torch.zeros(student_logits.shape[:-1], dtype=torch.long)
    return GKDTrainer.generalized_jsd_loss(student_logits, teacher_logits, labels, beta=beta)


def step_of(row: str, student: Any, teacher: Any, ids: Tensor) -> Any:
    """A function that makes the loss of a step and its gradients."""
    from hf_efficiency.distillation import top_k
    from hf_efficiency.distillation.chunked import Job, chunked_loss
    from hf_efficiency.distillation.heads import OutputHead
    from hf_efficiency.distillation.losses import Objective
    from hf_efficiency.distillation.teachers import CachedRows, ModelTeacher
    from hf_efficiency.distillation.trace import trace

    beta = float(row.partition("=")[2] or 0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    valid, labels = torch.ones(1, TOKENS - 1, dtype=torch.bool), ids[0, 1:]
    if row.startswith(("naive", "TRL")):
        loss = naive_loss if row.startswith("naive") else trl_loss

        def whole() -> None:
            with torch.no_grad():
                teacher_logits = teacher(**inputs, use_cache=False).logits
            logits = student(**inputs, use_cache=False).logits
            loss(logits[0, :-1], teacher_logits[0, :-1], beta).backward()

        return whole
    rows = ModelTeacher(teacher).answer(inputs, valid).rows
    cached = CachedRows(top_k(rows(slice(None)), 64)) if "cache" in row else None

    def ours() -> None:
        found = rows_of(cached, teacher, inputs, valid)
        hidden = trace(student, inputs).hidden[:, :-1][valid]
        if row == "body alone":
            hidden.sum().backward()
            return
        job = Job(Objective("jsd", beta=beta), labels, found, 49152, monitor="monitored" in row)
        total, _ = chunked_loss(job, OutputHead(student), hidden)
        (total / len(hidden)).backward()

    def rows_of(cache: Any, model: Any, given: dict[str, Tensor], where: Tensor) -> Any:
        return cache or ModelTeacher(model).answer(given, where).rows

    return ours


def measure_memory(row: str, text: str) -> dict[str, float]:
    from hf_efficiency.distillation import make_student

    teacher, tokenizer = load()
    student = make_student(teacher, keep=BLOCKS)
    ids = tokenizer(text[:20000], return_tensors="pt", verbose=False).input_ids[:, :TOKENS]
    step = step_of(row, student, teacher, ids)
    step()  # makes the gradients
    seconds = []
    for _ in range(2):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return {"units": peak / (TOKENS * 49152 * 4), "seconds": min(seconds)}


# Training.


@torch.no_grad()
def quality(student: Any, teacher: Any, rows: Tensor) -> dict[str, float]:
    """Mean over tokens of KL(teacher ‖ student), cross-entropy and agreement, from whole logits."""
    student.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for row in rows.split(4):
        q, p = (m(row, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1) for m in (student, teacher))
        kl = F.kl_div(q, p, reduction="sum", log_target=True)
        ce = F.nll_loss(q, row[:, 1:].flatten(), reduction="sum")
        sums += torch.stack([kl, ce, (q.argmax(-1) == p.argmax(-1)).sum()]).double()
    kl, ce, agreement = (sums / rows[:, 1:].numel()).tolist()
    return {"kl": kl, "ce": ce, "agreement": agreement}


def measure_training(row: str, text: str) -> dict[str, float]:
    from hf_efficiency import DistillConfig, DistillTrainer, cache_teacher, make_student

    teacher, tokenizer = load()
    train, evaluation = token_rows(tokenizer, text)
    student = make_student(teacher, keep=BLOCKS)
    if row == "start":
        return quality(student, teacher, evaluation)
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in train[: STEPS * ROWS]]
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder, "max_steps": STEPS, "per_device_train_batch_size": ROWS, "learning_rate": RATE,
            "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10,
            "lr_scheduler_type": "constant",
        }  # fmt: skip
        if row.startswith("TRL"):
            return measured(trl_trainer(student, teacher, tokenizer, rows, common), student, teacher, evaluation)
        who, held = teacher, None
        if row.startswith("cached"):
            start = time.process_time()
            who = cache_teacher(teacher, [r["input_ids"] for r in rows], f"{folder}/cache", top_k=64)
            held = {
                "cache_seconds": time.process_time() - start,
                "cache_bytes": sum(p.stat().st_size for p in who.folder.iterdir()) / who.manifest["tokens"],
            }
        trainer = DistillTrainer(student, who, DistillConfig(**common, **(TRAINING[row] or {})), train_dataset=rows)
        return {**measured(trainer, student, teacher, evaluation), **(held or {})}


def measured(trainer: Any, student: Any, teacher: Any, evaluation: Tensor) -> dict[str, float]:
    start = time.process_time()
    trainer.train()
    seconds = (time.process_time() - start) / STEPS
    return {**quality(student, teacher, evaluation), "seconds": seconds}


def trl_trainer(student: Any, teacher: Any, tokenizer: Any, rows: list[Any], common: dict[str, Any]) -> Any:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from hf_efficiency.integrations.transformers.distillation_data import DistillCollator

    args = GKDConfig(**common, lmbda=0.0, beta=0.0, bf16=False, gradient_checkpointing=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    class Rows(torch.utils.data.Dataset):  # what SFTTrainer leaves alone
        column_names = ("input_ids", "labels")

        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, i: int) -> dict[str, list[int]]:
            return copy.deepcopy(rows[i])

    return GKDTrainer(
        student, teacher, args, data_collator=DistillCollator(), train_dataset=Rows(), processing_class=tokenizer
    )


# The table.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=("memory", "training"))
    parser.add_argument("--text", required=True, metavar="FILE")
    parser.add_argument("--only", metavar="ROWS", help="some of the rows, separated by commas")
    parser.add_argument("--output", metavar="FILE", help="where the table goes; by default it is printed")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    text = Path(args.text).read_text(encoding="utf-8")
    if args.child:
        run = measure_memory if args.measure == "memory" else measure_training
        print(json.dumps(run(args.child, text)))
        return
    known = MEMORY if args.measure == "memory" else list(TRAINING)
    lines = []
    for row in args.only.split(",") if args.only else known:
        command = [sys.executable, __file__, args.measure, "--text", args.text, "--child", row]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            print(f"{row}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        found = json.loads(done.stdout.strip().splitlines()[-1])
        cells = [f"{found[key]:.3f}" if key in found else "" for key in columns(args.measure)]
        lines.append(f"| {row} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    names = ["row", *columns(args.measure)]
    table = "\n".join([f"| {' | '.join(names)} |", "|" + "---|" * len(names), *lines, ""])
    if args.output:
        Path(args.output).write_text(table, encoding="utf-8")
    else:
        print(table)


def columns(measure: str) -> list[str]:
    return ["units", "seconds"] if measure == "memory" else [
        "kl", "ce", "agreement", "seconds", "cache_seconds", "cache_bytes"
    ]  # fmt: skip


if __name__ == "__main__":
    main()
