"""`hf-efficiency info DIR`: what a checkpoint folder holds, read from its headers alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from hf_efficiency.evaluation import Report, bytes_on_disk
from hf_efficiency.evaluation.report import size

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    folder = Path(args.folder)
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"the folder {args.folder!r} is no checkpoint: it has no config.json")
    config = json.loads(file.read_text(encoding="utf-8"))
    quantization = config.get("quantization_config")
    print(
        f"Model         {', '.join(config.get('architectures') or ['unknown'])}, dtype {config.get('dtype', 'unknown')}"
    )
    if quantization is None:
        print("Quantization  none")
    else:
        method = quantization.get("quant_method", "unknown")
        shown = [f"{key}={value}" for key, value in quantization.items() if value not in (None, {}, [])
                 and key not in ("meta", "quant_method")]  # fmt: skip
        print(f"Quantization  {method}: {', '.join(shown)}")
        print(f"Made by       {json.dumps(quantization.get('meta', {}))}")
    print(f"Weights       {size(bytes_on_disk(folder))} in {_tensors(folder)}")
    if (folder / "report.json").is_file():
        print(f"\n{Report.from_json(folder / 'report.json').table()}")
    return 0


def _tensors(folder: Path) -> str:
    counts: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    counts[file.get_slice(key).get_dtype()] += 1
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    return ", ".join(f"{count} {dtype} tensors" for dtype, count in counts.most_common()) or "no safetensors file"
