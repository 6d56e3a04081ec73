"""Every quantization method with small arguments. `test_methods.py` crosses this table; a new method is a row."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hf_efficiency import AWQConfig, GPTQConfig, NF4Config, QuIPSharpConfig, RTNConfig

# Stored bits of a weight (name, d_in, d_out), counted from the format's definition.
Formula = Callable[[str, int, int], float]


def gptq_format(bits, group=32, rows=lambda name: {}):
    """Codes; a float16 scale and a zero point of `bits` a group; the int32 group of each column.

    Args:
        bits: Of a code.
        group: Columns of a group; -1 for all.
        rows: Overrides of the two, by the layer's name.
    """

    def formula(name, d_in, d_out):
        width, size = {"bits": bits, "group": group, **rows(name)}.values()
        groups = 1 if size == -1 else -(-d_in // size)
        return width + (16 + width) * groups / d_in + 32 / d_out

    return formula


def awq_format(group=32):
    """4-bit codes; a float16 scale and a 4-bit zero point a group."""
    return lambda name, d_in, d_out: 4 + 20 / group


def nf4_format(block, nested):
    """4-bit codes and the scales of the blocks, float32 or 8 bits with float32 over 256 of them; tables; one offset."""

    def formula(name, d_in, d_out):
        blocks = -(-d_in * d_out // block)
        scales = 8 * blocks + 32 * (-(-blocks // 256) + 256) if nested else 32 * blocks
        return 4 + (scales + 32 * 16 + 32) / (d_in * d_out)

    return formula


def lattice_format(bits, tuned=False):
    """Codes, one float32 scale, and an int64 seed or two float16 vectors."""
    return lambda name, d_in, d_out: bits + (32 + (16 * (d_in + d_out) if tuned else 64)) / (d_in * d_out)


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        config: The config class.
        formula: Bits per weight that the format's definition gives.
        arguments: Of the config.
        error: Bound on the relative error of the tiny Llama's logits in float32, so that a result that is only
            consistent with itself does not pass.
        calibrated: Whether the method needs data.
    """

    config: type
    formula: Formula
    error: float
    arguments: dict[str, Any] = field(default_factory=dict)
    calibrated: bool = False

    def build(self, tokens, **overrides):
        """The config; `tokens` (n, t) are its calibration data where it needs any."""
        data = {}
        if self.calibrated:
            n, t = tokens.shape
            data = {"calibration": tokens, "num_samples": n, "seq_len": t, "batch_size": n, "progress": False}
        return self.config(**{**self.arguments, **data, **overrides})


def _rtn(formula, error, **arguments):
    return Method(RTNConfig, formula, error, arguments)


def _gptq(formula, error, **arguments):
    return Method(GPTQConfig, formula, error, {"group_size": 32, **arguments}, calibrated=True)


def _quip(bits, error, **arguments):
    tuned = bool(arguments)
    return Method(QuIPSharpConfig, lattice_format(bits, tuned), error, {"bits": bits, **arguments}, calibrated=True)


_REFINED = {"bits": 4, "refine_steps": 4, "refine_lr": 0.01}
_MIXED = {"+:.*v_proj": {"bits": 8, "group_size": -1}, "-:.*down_proj": {}}


def _mixed_bits(name):
    return {"bits": 8, "group": -1} if name.endswith("v_proj") else {}


METHODS = {
    "rtn-group": _rtn(gptq_format(4), 0.35, bits=4, group_size=32),
    "rtn-ragged": _rtn(gptq_format(4, 48), 0.35, bits=4, group_size=48),
    "rtn-channel": _rtn(gptq_format(8, -1), 0.03, bits=8, granularity="channel"),
    "rtn-tensor": _rtn(gptq_format(8, -1), 0.04, bits=8, granularity="tensor"),
    "rtn-block": _rtn(gptq_format(4), 0.5, bits=4, granularity="block", group_size=32, block_rows=16),
    "rtn-sym": _rtn(gptq_format(4), 0.4, bits=4, group_size=32, sym=True),
    "rtn-clip": _rtn(gptq_format(3), 0.65, bits=3, group_size=32, clip=True),
    "rtn-v2": _rtn(gptq_format(2), 1.3, bits=2, group_size=32, format="gptq_v2"),
    "rtn-refined": Method(RTNConfig, gptq_format(4), 0.35, {"group_size": 32, **_REFINED}, calibrated=True),
    "gptq-2": _gptq(gptq_format(2), 0.9, bits=2),
    "gptq-3": _gptq(gptq_format(3), 0.45, bits=3),
    "gptq-4": _gptq(gptq_format(4), 0.22, bits=4),
    "gptq-8": _gptq(gptq_format(8), 0.015, bits=8),
    "gptq-sym-ordered": _gptq(gptq_format(4), 0.25, bits=4, sym=True, desc_act=True),
    "gptq-in-place": _gptq(gptq_format(4), 0.25, bits=4, desc_act=False),
    "gptq-mixed": _gptq(gptq_format(4, rows=_mixed_bits), 0.2, bits=4, dynamic=_MIXED),
    "gptq-refined": _gptq(gptq_format(4), 0.22, **_REFINED),
    "awq-4": Method(AWQConfig, awq_format(), 0.3, {"bits": 4, "group_size": 32}, calibrated=True),
    "awq-3": Method(AWQConfig, gptq_format(3), 0.6, {"bits": 3, "group_size": 32}, calibrated=True),
    "awq-8": Method(AWQConfig, gptq_format(8), 0.02, {"bits": 8, "group_size": 32}, calibrated=True),
    "nf4": Method(NF4Config, nf4_format(64, nested=False), 0.4, {"double_quant": False}),
    "nf4-double": Method(NF4Config, nf4_format(32, nested=True), 0.4, {"double_quant": True, "block_size": 32}),
    "quip-2": _quip(2, 0.8),
    "quip-3": _quip(3, 0.5),
    "quip-4": _quip(4, 0.25),
    "quip-tuned": _quip(2, 0.8, fine_tune_steps=2),
}

# One method for each storage layer and layout.
STORAGES = ("rtn-group", "gptq-mixed", "awq-4", "nf4-double", "quip-2", "quip-tuned")
