"""`hf-efficiency dequantize DIR`: the dense model that a compressed checkpoint stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_efficiency.cli.models import load_model, load_tokenizer, pick_device, quantization_of, resolve
from hf_efficiency.evaluation import bytes_on_disk
from hf_efficiency.evaluation.report import size
from hf_efficiency.saving import check_output, save_checkpoint

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    check_output(args.output, overwrite=args.overwrite)
    device = pick_device(args.device)
    with resolve(args.folder) as source:
        if quantization_of(source.path) is None:
            raise ValueError(f"{args.folder!r} is not quantized: there is nothing to dequantize")
        model = load_model(source.path, args.dtype, device)
        model.dequantize()
        out = save_checkpoint(model, load_tokenizer(source), args.output, overwrite=args.overwrite)
    print(f"{out}: dense, {size(bytes_on_disk(out))}")
    return 0
