"""The two tables of 1 KB that codes are decoded with, from the definition of the codebooks.

A codebook's vectors of 8 are packed as 8 digits of 4 bits, coordinate i in the bits from 4 i on.
"""

import itertools

import torch
from torch import Tensor

_PADDING = 29  # patterns of squared norm 12 that fill up the 256


def e8p_tables(device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """The tables of both codebooks (Tseng et al. 2024, "QuIP#", section 4.2 and appendix C).

    Args:
        device: Where they are put. Build them once, and not in every call.

    Returns:
        `patterns` (256,) int32: the absolute values of E8P times 2, one of 1, 3 and 5 a digit, sorted: squared norms up
        to 10, then the lexicographically first 29 of norm 12. Bit 31 is set where their sum is odd.
        `roots` (256,) int32: the 1-bit E8 codebook times 2, plus 8: zero, the 240 roots of E8, and 15 of `+-2 e_i`.
    """
    grid = [p for p in itertools.product((1, 3, 5), repeat=8) if sum(v * v for v in p) <= 48]
    inner = [p for p in grid if sum(v * v for v in p) <= 40]
    outer = [p for p in grid if sum(v * v for v in p) == 48 and max(p) == 3][:_PADDING]
    patterns = [_packed(p) | (sum(p) // 2 & 1) << 31 for p in inner + outer]
    whole = [v for v in itertools.product((-2, 0, 2), repeat=8) if sum(x * x for x in v) in (0, 8)]
    half = [v for v in itertools.product((-1, 1), repeat=8) if sum(v) % 4 == 0]
    axes = [tuple(sign * 4 * (i == j) for j in range(8)) for i in range(8) for sign in (1, -1)][:15]
    roots = [_packed(tuple(x + 8 for x in v)) for v in whole + half + axes]
    first, second = (torch.tensor([_signed(v) for v in t], dtype=torch.int32, device=device) for t in (patterns, roots))
    return first, second


def _packed(digits: tuple[int, ...]) -> int:
    return sum(digit << 4 * i for i, digit in enumerate(digits))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
