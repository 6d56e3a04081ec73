"""Round to nearest: the data-free baseline.

Shape legend: d_out, d_in features.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_efficiency.calibration.method import InputGroup
from hf_efficiency.quantization.affine import AffineGrid
from hf_efficiency.quantization.layers.affine import AffineLinear
from hf_efficiency.quantization.layers.base import QuantizedLinear
from hf_efficiency.quantization.scheme import AffineMethod

GRANULARITIES = ("group", "channel", "tensor", "block")


@dataclass(kw_only=True)
class RTN(AffineMethod):
    """Rounds each weight to the nearest code of its scale.

    Attributes:
        granularity: What shares a scale: `"group"` (`group_size` columns of a row), `"channel"` (a row), `"tensor"`,
            or `"block"` (`block_rows` rows by `group_size` columns).
        block_rows: Rows of a 2-D block.
        clip: Search the range of each scale for the smallest squared error instead of taking minimum and maximum.

    Shared scales are written once a row, because the standard formats know rows and groups only.
    """

    calibrated: ClassVar[bool] = False
    statistics: ClassVar[frozenset[str]] = frozenset({"hessian"})

    granularity: str = "group"
    block_rows: int = 16
    clip: bool = False

    def validate(self) -> None:
        """ValueError for values out of range."""
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity={self.granularity!r} is unknown: choose one of {', '.join(GRANULARITIES)}.")
        if self.block_rows < 1:
            raise ValueError(f"block_rows={self.block_rows} must be at least 1.")
        if self.granularity in ("channel", "tensor"):
            self.group_size = -1
        super().validate()

    def grid(self, name: str) -> AffineGrid:
        """The grid of the layer called `name`, with the rows that share a scale."""
        bits, group_size, sym = self.scheme(name)
        rows = {"tensor": 0, "block": self.block_rows}.get(self.granularity, 1)
        return AffineGrid(bits, group_size, sym, rows=rows, clip=self.clip)

    def quantize_weight(self, name: str, weight: Tensor, layer: QuantizedLinear) -> None:
        """Rounds `weight` (d_out, d_in) and packs it into `layer`."""
        if not isinstance(layer, AffineLinear):
            raise TypeError(f"{name}: RTN stores into AffineLinear, got {type(layer).__name__}.")
        weight = weight.float()
        grid = self.grid(name)
        layer.pack(grid.quantize(weight, *grid.fit(weight)))

    def compress_group(self, group: InputGroup) -> None:
        """Rounds every member; the statistics are not used (only refinement needs the engine)."""
        for name, weight in zip(group.names, group.weights(), strict=True):
            layer = group.new_layer(self, name)
            self.quantize_weight(name, weight, layer)
            group.store(name, layer)
