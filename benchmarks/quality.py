"""Perplexity and CPU time of our methods and of other quantization packages, on one text and one split of it.

    python benchmarks/quality.py --model PATH --text wikitext2-valid.txt --only auto-round-4,rtn-4 --output quality.md

The file is tokenized once. Calibration: 32 windows of 512 tokens, drawn with seed 0 from the first 40 % of the tokens.
Evaluation: the first 40 windows of 512 tokens of the last 40 %. Both are the same for every method. Weights in
bfloat16, groups of 64, asymmetric. CPU seconds (user and system, all threads) are those of quantizing alone: imports,
loading and evaluation are left out. Each method runs in a process of its own, one after the other; a package that is
not installed is skipped with a line that says so.

The packages are not dependencies of this project: `pip install gptqmodel auto-round llmcompressor bitsandbytes`.
"""

import argparse
import importlib
import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

WINDOW = 512
CALIBRATION_WINDOWS = 32
EVALUATION_WINDOWS = 40
CALIBRATION_SHARE, EVALUATION_SHARE = 0.4, 0.4  # from the start, from the end
GROUP_SIZE = 64
AUTO_ROUND_STEPS = 20
REFINE_STEPS = 12
FINE_TUNE_STEPS = 24
SKIPPED = 3  # exit status of a child whose package is missing


@dataclass
class Task:
    """What a peer needs, and what it took."""

    model: str
    tokenizer: Any
    tokens: Tensor  # (windows, WINDOW): calibration
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    notes: dict[str, str] = field(default_factory=dict)

    def load(self, **kwargs: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.bfloat16, **kwargs)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Times what stands inside, child processes included."""
        cpu, wall = _cpu_seconds(), time.perf_counter()
        yield
        self.cpu_seconds, self.wall_seconds = _cpu_seconds() - cpu, time.perf_counter() - wall

    def samples(self) -> list[dict[str, Tensor]]:
        """The calibration windows as batches of one."""
        return [{"input_ids": row[None].clone(), "attention_mask": torch.ones_like(row[None])} for row in self.tokens]


def _cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def split(tokenizer: Any, text: str) -> tuple[Tensor, Tensor]:
    """Calibration (CALIBRATION_WINDOWS, WINDOW) and evaluation (EVALUATION_WINDOWS, WINDOW) windows of a text."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    calibration = ids[: int(len(ids) * CALIBRATION_SHARE)]
    evaluation = ids[int(len(ids) * (1 - EVALUATION_SHARE)) :]
    windows = calibration[: len(calibration) // WINDOW * WINDOW].view(-1, WINDOW)
    if len(windows) < CALIBRATION_WINDOWS or len(evaluation) < EVALUATION_WINDOWS * WINDOW:
        raise ValueError(f"the text has {len(ids)} tokens, too few for {CALIBRATION_WINDOWS} + {EVALUATION_WINDOWS}.")
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:CALIBRATION_WINDOWS]
    return windows[chosen], evaluation[: EVALUATION_WINDOWS * WINDOW].view(-1, WINDOW)


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood; the first token of a window is only read."""
    total = 0.0
    for row in windows:
        logits = model(row[None], use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, row[1:], reduction="sum").item()
    return math.exp(total / (windows.numel() - len(windows)))


# Methods. Each returns a model that can be evaluated.


def dense(task: Task) -> nn.Module:
    return task.load()


def ours(name: str, bits: int, **fields: Any) -> Callable[[Task], nn.Module]:
    def run(task: Task) -> nn.Module:
        package = importlib.import_module("hf_efficiency")
        grouped = {} if name == "QuIPSharpConfig" else {"group_size": GROUP_SIZE}
        config = getattr(package, name)(**({} if name == "NF4Config" else {"bits": bits, **grouped}), **fields)
        if config.needs_calibration:
            config.calibration, config.num_samples, config.seq_len = task.tokens, CALIBRATION_WINDOWS, WINDOW
        with task.timed():
            return task.load(quantization_config=config)

    return run


def bitsandbytes_nf4(task: Task) -> nn.Module:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with task.timed():
        return task.load(quantization_config=config, device_map="cpu")


def gptqmodel(bits: int) -> Callable[[Task], nn.Module]:
    def run(task: Task) -> nn.Module:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default asks for more than two cores have
        package = importlib.import_module("gptqmodel")
        config = package.QuantizeConfig(bits=bits, group_size=GROUP_SIZE, sym=False)
        model = package.GPTQModel.load(task.model, config, device="cpu", dtype=torch.bfloat16)
        rows = [{key: value[0].tolist() for key, value in sample.items()} for sample in task.samples()]
        with task.timed():
            model.quantize(rows, batch_size=1, tokenizer=task.tokenizer)
        folder = tempfile.mkdtemp(dir=task.notes["scratch"])
        model.save(folder)
        return package.GPTQModel.load(folder, device="cpu", backend="torch", dtype=torch.bfloat16)

    return run


def auto_round(bits: int) -> Callable[[Task], nn.Module]:
    def run(task: Task) -> nn.Module:
        package = importlib.import_module("auto_round")
        rounder = package.AutoRound(
            task.load(),
            task.tokenizer,
            scheme=f"W{bits}A16",
            group_size=GROUP_SIZE,
            sym=False,
            iters=AUTO_ROUND_STEPS,
            nsamples=CALIBRATION_WINDOWS,
            seqlen=WINDOW,
            dataset=task.samples(),
            device_map="cpu",
            enable_torch_compile=False,  # the compiler's own time would count
        )
        with task.timed():
            model, _ = rounder.quantize()
        return model

    return run


def llm_compressor(bits: int) -> Callable[[Task], nn.Module]:
    def run(task: Task) -> nn.Module:
        package = importlib.import_module("llmcompressor")
        modifiers = importlib.import_module("llmcompressor.modifiers.gptq")
        dataset = importlib.import_module("datasets").Dataset.from_list(
            [{key: value[0].tolist() for key, value in sample.items()} for sample in task.samples()]
        )
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": False,
            "strategy": "group",
            "group_size": GROUP_SIZE,
            "actorder": "static",
        }
        recipe = modifiers.GPTQModifier(
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
        )
        model = task.load()
        with task.timed():
            package.oneshot(
                model=model,
                dataset=dataset,
                recipe=recipe,
                max_seq_length=WINDOW,
                num_calibration_samples=CALIBRATION_WINDOWS,
                shuffle_calibration_samples=False,
            )
        return model

    return run


@dataclass
class Peer:
    """One row of the table: the package it needs, a label, and what it does."""

    package: str
    label: str
    run: Callable[[Task], nn.Module]


PEERS: dict[str, Peer] = {"dense": Peer("transformers", "dense", dense)}
for _bits in (4, 3, 2):
    PEERS |= {
        f"rtn-{_bits}": Peer("hf_efficiency", f"hf_efficiency RTN {_bits}", ours("RTNConfig", _bits)),
        f"gptq-{_bits}": Peer("hf_efficiency", f"hf_efficiency GPTQ {_bits}", ours("GPTQConfig", _bits)),
        f"refined-{_bits}": Peer(
            "hf_efficiency",
            f"hf_efficiency GPTQ {_bits}, refined",
            ours("GPTQConfig", _bits, refine_steps=REFINE_STEPS),
        ),
        f"quip-{_bits}": Peer("hf_efficiency", f"hf_efficiency QuIP# {_bits}", ours("QuIPSharpConfig", _bits)),
        f"quip-tuned-{_bits}": Peer(
            "hf_efficiency",
            f"hf_efficiency QuIP# {_bits}, fine-tuned",
            ours("QuIPSharpConfig", _bits, fine_tune_steps=FINE_TUNE_STEPS),
        ),
        f"gptqmodel-{_bits}": Peer("gptqmodel", f"gptqmodel GPTQ {_bits}", gptqmodel(_bits)),
        f"auto-round-{_bits}": Peer("auto_round", f"auto-round {_bits}, {AUTO_ROUND_STEPS} steps", auto_round(_bits)),
        f"llm-compressor-{_bits}": Peer(
            "llmcompressor", f"llm-compressor GPTQ {_bits}, static actorder", llm_compressor(_bits)
        ),
    }
PEERS["awq-4"] = Peer("hf_efficiency", "hf_efficiency AWQ 4", ours("AWQConfig", 4))
PEERS["awq-3"] = Peer("hf_efficiency", "hf_efficiency AWQ 3", ours("AWQConfig", 3))
PEERS["nf4"] = Peer("hf_efficiency", "hf_efficiency NF4, double quantization", ours("NF4Config", 4))
PEERS["bitsandbytes-nf4"] = Peer("bitsandbytes", "bitsandbytes NF4, double quantization", bitsandbytes_nf4)


def version(package: str) -> str:
    """Version of an importable package, or "" where there is none."""
    try:
        return str(getattr(importlib.import_module(package), "__version__", ""))
    except ImportError:
        return ""


def run_here(name: str, model: str, text: str, result: str) -> int:
    """The child process: one method, its measurements as JSON."""
    peer = PEERS[name]
    found = version(peer.package)
    if not found:
        return SKIPPED
    tokenizer = AutoTokenizer.from_pretrained(model)
    calibration, evaluation = split(tokenizer, Path(text).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        task = Task(model, tokenizer, calibration, notes={"scratch": scratch})
        quantized = peer.run(task)
        quantized.eval()
        value = perplexity(quantized, evaluation)
    row = {
        "name": name,
        "label": peer.label,
        "version": found,
        "perplexity": value,
        "cpu_seconds": task.cpu_seconds,
        "wall_seconds": task.wall_seconds,
        "threads": torch.get_num_threads(),
    }
    Path(result).write_text(json.dumps(row), encoding="utf-8")
    return 0


def run_apart(name: str, model: str, text: str) -> dict[str, Any] | None:
    """Starts the child; None where the package is missing or the method failed."""
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log.txt")
        command = [sys.executable, __file__, "--model", model, "--text", text, "--child", name, "--result", str(result)]
        with log.open("w") as sink:
            status = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, check=False).returncode
        if status == SKIPPED:
            print(f"{name}: skipped, {PEERS[name].package} is not installed", flush=True)
            return None
        if status or not result.exists():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            print(f"{name}: failed with status {status}\n{tail}", flush=True)
            return None
        row: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| method | version | perplexity | CPU s | wall s | threads |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['label']} | {r['version']} | {r['perplexity']:,.2f} | {r['cpu_seconds']:.0f} | {r['wall_seconds']:.0f} "
        f"| {r['threads']} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the dense checkpoint")
    parser.add_argument("--text", required=True, help="UTF-8 text file to calibrate and evaluate on")
    parser.add_argument("--only", default=",".join(PEERS), help="comma-separated rows, in the order to run them")
    parser.add_argument("--output", type=Path, help="markdown file; rewritten after each row")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return run_here(arguments.child, arguments.model, arguments.text, arguments.result)
    names = arguments.only.split(",")
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        parser.error(f"--only {', '.join(unknown)}: choose from {', '.join(PEERS)}")
    rows: list[dict[str, Any]] = []
    for name in names:
        row = run_apart(name, arguments.model, arguments.text)
        if row is None:
            continue
        rows.append(row)
        print(json.dumps(row), flush=True)
        if arguments.output:
            arguments.output.write_text(table(rows), encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
