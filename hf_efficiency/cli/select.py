"""`hf-efficiency select FILE|DATASET --strategy NAME`: choose training data, and say what was chosen."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from hf_efficiency.cli.configs import parse_assignment
from hf_efficiency.cli.models import load_model, load_tokenizer, resolve
from hf_efficiency.cli.select_data import chosen_rows, open_data
from hf_efficiency.cli.select_report import draw, page
from hf_efficiency.saving import staged_folder
from hf_efficiency.selection import STRATEGIES, Selection, select
from hf_efficiency.selection.strategies import check_needs, settings_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

_FILES = {"subset.jsonl", "scores.safetensors", "report.json", "report.png", "README.md"}


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    if args.strategy == "list":
        for name, strategy in STRATEGIES.items():
            needs = f" (needs {', '.join(sorted(strategy.needs))})" if strategy.needs else ""
            print(f"{name:<20}{strategy.summary}{needs}")
        return 0
    settings = dict(map(parse_assignment, args.set))
    settings_of(args.strategy, settings)
    output = _checked_output(args)
    check_needs(args.strategy, args.model, args.model, args.target)
    if args.k is not None and args.fraction is not None:
        raise ValueError("--k and --fraction say the same: give one of them")
    data = open_data(args.data, args.split)
    scores_folder = output.with_name(output.name + ".scores") if args.resume else None
    with _model(args) as (model, tokenizer):
        selection = select(
            data,
            args.strategy,
            args.k if args.fraction is None else args.fraction,
            model=model,
            tokenizer=tokenizer,
            target=None if args.target is None else open_data(args.target, args.split),
            text_column=args.text_column,
            seed=args.seed,
            batch_size=args.batch_size,
            max_length=args.max_length,
            cache_dir=scores_folder,
            progress=sys.stderr.isatty(),
            **settings,
        )
    report = {"command": shlex.join(["hf-efficiency", *args.argv]), "data": args.data, **selection.report}
    with staged_folder(output) as folder:
        lengths = _write_subset(data, selection, folder / "subset.jsonl", args.text_column)
        report["characters"] = {"pool": int(lengths.sum()), "chosen": int(lengths[selection.indices].sum())}
        _write_scores(selection, folder / "scores.safetensors")
        (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draw(selection, lengths, folder / "report.png")
        (folder / "README.md").write_text(page(report), encoding="utf-8")
    if scores_folder is not None:
        shutil.rmtree(scores_folder, ignore_errors=True)
    print(f"{output}: {len(selection)} of {len(selection.scores)} rows")
    return 0


def _checked_output(args: argparse.Namespace) -> Path:
    """The output folder.

    Raises:
        ValueError: it is missing, a file, not empty without --overwrite, or holds something else.
    """
    if args.output is None:
        raise ValueError("--output is missing: name the folder for the subset, the scores and the report")
    folder = Path(args.output).absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the output {args.output!r} is a file; give a folder")
    entries = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    foreign = next((name for name in entries if name not in _FILES), None)
    if foreign is not None:
        raise ValueError(
            f"the folder {args.output!r} holds {foreign!r}, which is no part of a selection: choose another"
        )
    if entries and not args.overwrite:
        raise ValueError(f"the folder {args.output!r} is not empty: choose another one, or allow --overwrite")
    return folder


@contextlib.contextmanager
def _model(args: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    if args.model is None:
        yield None, None
        return
    with resolve(args.model) as source:
        yield load_model(source.path, args.dtype, args.device), load_tokenizer(source)


def _write_subset(data: Any, selection: Selection, file: Path, text_column: str | None) -> np.ndarray:
    """Writes the chosen rows in the data's order, and returns the characters of every text, (n,)."""
    chosen = np.zeros(len(selection.scores), bool)
    chosen[selection.indices] = True
    lengths = np.zeros(len(chosen), np.int64)
    with file.open("w", encoding="utf-8") as out:
        for i, row, text in chosen_rows(data, text_column):
            lengths[i] = len(text)
            if chosen[i]:
                content = {"text": row} if isinstance(row, str) else row
                out.write(json.dumps(content, ensure_ascii=False, default=str) + "\n")
    return lengths


def _write_scores(selection: Selection, file: Path) -> None:
    tensors = {"scores": selection.scores, "indices": selection.indices, "weights": selection.weights}
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(arrays, file, metadata={"column": selection.column})
