"""Which tiles and how many programs a launch takes. A rule and no autotuner: it would run updates in place many times.

Shape legend: a product (m, n) of k terms, in elements of `size` bytes.
"""

from dataclasses import dataclass
from functools import cache

import torch

STAGES = 2 if torch.version.hip else 3  # AMD has 64 KiB of shared memory
PARTS = 4  # of k, where the product alone has too few tiles
H100_PROCESSORS = 132


@dataclass(frozen=True)
class Tile:
    """What one program computes, in steps of `block_k` terms."""

    block_m: int
    block_n: int
    block_k: int
    warps: int

    def count(self, m: int, n: int) -> int:
        """Tiles that an (m, n) matrix has."""
        return -(-m // self.block_m) * -(-n // self.block_n)

    @property
    def constexprs(self) -> dict[str, int]:
        """For a launch."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}


# For half precision. Small: small weights; middle: what memory bounds, however small the rank; large: what matrix
# instructions bound, whose operands it reads less often.
SMALL = Tile(64, 64, 64, 4)
MIDDLE = Tile(128, 128, 64, 8)
LARGE = Tile(128, 256, 64, 8)
FLOAT32 = Tile(128, 64, 32, 8)  # a larger one has no registers for the parts of its products


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; those of an H100 where there is none."""
    if device.type != "cuda":
        return H100_PROCESSORS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def plan_project(m: int, n: int, k: int, size: int, programs: int) -> tuple[Tile, int]:
    """Tile and parts of k for R (m, n), so that about `programs` run."""
    enough = 3 * programs // 4  # less than one wave, but nothing of R goes through memory
    if size == 4:
        tile = FLOAT32
    else:
        tile = LARGE if LARGE.count(m, n) >= enough else MIDDLE
    return tile, 1 if tile.count(m, n) >= enough or k < PARTS * tile.block_k else PARTS


def plan_apply(m: int, n: int, k: int, size: int, programs: int) -> Tile:
    """Tile for W (m, n) and the rank k."""
    if size == 4:
        return FLOAT32
    if MIDDLE.count(m, n) < programs:
        return SMALL
    return LARGE if k >= 256 and LARGE.count(m, n) >= programs else MIDDLE
