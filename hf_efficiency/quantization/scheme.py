"""What all affine methods share: the width and grouping of each layer, per-module overrides, the storage layer."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_efficiency.calibration.method import BlockContext, BlockMethod
from hf_efficiency.calibration.structure import weight_of
from hf_efficiency.quantization.affine import AffineGrid
from hf_efficiency.quantization.formats import LAYOUTS
from hf_efficiency.quantization.layers.affine import AffineLinear, check_bits
from hf_efficiency.quantization.layers.base import QuantizedLinear
from hf_efficiency.quantization.refinement import check_refinement, refine_block

_OVERRIDES = ("bits", "group_size", "sym")


@dataclass(kw_only=True)
class AffineMethod(BlockMethod):
    """Fields and storage that every affine method has.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: Columns that share a scale; -1 for one scale a row. A ragged last group is fine where the format
            allows it.
        sym: Whether the zero point is the middle code.
        dynamic: Overrides by regular expression, matched from the start of the full module name, in the convention
            of gptqmodel: `{"-:.*down_proj": {}}` leaves layers dense, `{"+:.*v_proj": {"bits": 8}}` (the `+:` may be
            omitted) changes bits, group_size or sym. The first match counts.
        format: Checkpoint layout: `"gptq"`, `"gptq_v2"` or `"awq"`.
        refine_steps: Steps in which the rounding and the clipping of each finished block are learned against the dense
            block's output (`refinement.py`); 0 for none. Needs calibration data, whatever the method.
        refine_lr: Size of the first step, in units of the grid's spacing; None for one that suits `refine_steps`.
        refine_batch_size: Calibration sequences of a step.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = False
    dynamic: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: str = "gptq"
    refine_steps: int = 0
    refine_lr: float | None = None
    refine_batch_size: int = 2

    def validate(self) -> None:
        """ValueError for values out of range, naming value, bound and cure."""
        check_bits(self.bits)
        check_group_size(self.group_size)
        if self.format not in LAYOUTS:
            raise ValueError(f"format={self.format!r} is unknown: choose one of {', '.join(LAYOUTS)}.")
        if self.format == "awq" and self.bits != 4:
            raise ValueError(f"the awq format holds 4-bit codes only, got bits={self.bits}; set format='gptq'.")
        for pattern, override in (self.dynamic or {}).items():
            _check_override(pattern, override)
        check_refinement(self.refine_steps, self.refine_lr, self.refine_batch_size)

    @property
    def keep_dense(self) -> bool:
        """Refinement compares with the dense model's hidden states."""
        return self.refine_steps > 0

    @property
    def refines(self) -> bool:
        """Whether `refine_steps` asks for it."""
        return self.refine_steps > 0

    def start_block(self, ctx: BlockContext) -> None:
        """Keeps the weights that refinement starts from. A subclass that changes weights here calls this afterwards."""
        if self.refines:
            # No field: it lives as long as the block, and is no part of what a checkpoint records.
            self._dense_weights = {name: weight_of(linear).clone() for name, linear in ctx.linears.items()}

    def finish_block(self, ctx: BlockContext) -> None:
        """Refines the stored layers in place."""
        if self.refines:
            refine_block(
                ctx,
                self._dense_weights,
                {name: self.grid(name) for name in ctx.layers},
                steps=self.refine_steps,
                lr=self.refine_lr,
                batch_size=self.refine_batch_size,
            )
            del self._dense_weights

    def skips(self, name: str) -> bool:
        """Whether `dynamic` leaves the layer called `name` dense."""
        return any(p.startswith("-:") and re.match(p[2:], name) for p in self.dynamic or {})

    def scheme(self, name: str) -> tuple[int, int, bool]:
        """(bits, group_size, sym) of the layer called `name`."""
        for pattern, override in (self.dynamic or {}).items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
                return tuple(override.get(key, getattr(self, key)) for key in _OVERRIDES)
        return self.bits, self.group_size, self.sym

    def grid(self, name: str) -> AffineGrid:
        """The grid of the layer called `name`."""
        bits, group_size, sym = self.scheme(name)
        return AffineGrid(bits, group_size, sym)

    def empty_layer(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        compute_dtype: torch.dtype,
        device: torch.device | str | None,
        conv1d: bool,
    ) -> QuantizedLinear:
        """An `AffineLinear` of the layer's width and grouping. ValueError names the layer where the format can't."""
        bits, group_size, _ = self.scheme(name)
        try:
            return AffineLinear(
                in_features,
                out_features,
                bits=bits,
                group_size=group_size,
                layout=self.format,
                bias=bias,
                compute_dtype=compute_dtype,
                device=device,
                conv1d=conv1d,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def check_group_size(group_size: int) -> None:
    """ValueError unless -1 or a positive number."""
    if isinstance(group_size, bool) or not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise ValueError(f"group_size={group_size!r} must be a positive integer, or -1 for one group a row.")


def _check_override(pattern: str, override: dict[str, Any]) -> None:
    try:
        re.compile(pattern.removeprefix("-:").removeprefix("+:"))
    except re.error as error:
        raise ValueError(f"dynamic: {pattern!r} is no regular expression: {error}.") from error
    unknown = set(override) - set(_OVERRIDES)
    if unknown:
        raise ValueError(
            f"dynamic[{pattern!r}] sets {', '.join(sorted(unknown))}, but only {', '.join(_OVERRIDES)} can be changed."
        )
    if "bits" in override:
        check_bits(override["bits"])
    if "group_size" in override:
        check_group_size(override["group_size"])


def field_names(method: type) -> tuple[str, ...]:
    """Names of a method's dataclass fields."""
    return tuple(f.name for f in dataclasses.fields(method))
