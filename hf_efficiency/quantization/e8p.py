"""The E8P lattice codebook of QuIP# (Tseng et al. 2024, "QuIP#: Even Better LLM Quantization with Hadamard Incoherence
and Lattice Codebooks"), its residual extensions to 3 and 4 bits, and exact nearest-codeword search.

`E8 + 1/4` is the union of `D8^ + 1/4` and `D8^ - 1/4`, where `D8^` holds the half-integer vectors of even
coordinate sum. E8P keeps the members whose absolute values are one of 256 patterns `S`: all positive half-integer
vectors of squared norm up to 10 (227 of them) and 29 of squared norm 12. A pattern admits the sign vectors of one
parity only, so 8 bits of pattern, 7 of signs and 1 for the shift name 65,536 codewords: 16 bits for 8 weights.

Code layout, ours: bits 8-15 the pattern, bit 7 set for the shift -1/4, bits 0-6 set where coordinates 0-6 are negative
(before the shift); the sign of coordinate 7 follows from the parity. A codeword times 4 is odd and within +-11, so one
row of the decoding table is 8 int8, read as a single int64.

Shapes: n vectors to quantize, 8 their length, 65536 and 256 codewords.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = [
    "CODEBOOKS",
    "Codebook",
    "decode",
    "e8_table",
    "e8p_patterns",
    "e8p_table",
    "nearest_e8",
    "nearest_e8p",
    "rivals_e8p",
]

DIM = 8
_PADDING = 29
_CHUNK = 1 << 12  # vectors searched at once: the work space stays within the cache


@lru_cache(maxsize=1)
def e8p_patterns() -> Tensor:
    """`S`: `(256, 8)` float32 of 1/2, 3/2 and 5/2, sorted: squared norm up to 10 first, then the 29 of norm 12.

    The paper leaves open which 29 of the 56 patterns of norm 12 are kept. Here: the lexicographically first.
    """
    grid = [p for p in itertools.product((1, 3, 5), repeat=DIM) if sum(v * v for v in p) <= 48]
    inner = [p for p in grid if sum(v * v for v in p) <= 40]
    padding = [p for p in grid if sum(v * v for v in p) > 40 and max(p) == 3][:_PADDING]
    return torch.tensor(inner + padding, dtype=torch.float32) / 2


@lru_cache(maxsize=1)
def e8p_table() -> Tensor:
    """All codewords times 4: `(65536, 8)` int8, row = code."""
    code = torch.arange(1 << 16)
    pattern = e8p_patterns()[code >> 8]
    negative = (code[:, None] >> torch.arange(DIM - 1)) & 1
    last = (negative.sum(1) + pattern.sum(1).long()) & 1
    signs = 1 - 2 * torch.cat([negative, last[:, None]], dim=1)
    shift = 1 - 2 * (code >> 7 & 1)
    return (4 * pattern * signs + shift[:, None]).to(torch.int8)


@lru_cache(maxsize=1)
def e8_table() -> Tensor:
    """The 1-bit codebook times 4, `(256, 8)` int8: 0, the 240 roots of E8 (squared norm 2), 15 of `+-2 e_i`."""
    integer = [v for v in itertools.product((-2, 0, 2), repeat=DIM) if sum(x * x for x in v) in (0, 8)]
    half = [v for v in itertools.product((-1, 1), repeat=DIM) if sum(v) % 4 == 0]
    axes = [tuple(sign * 4 * (i == j) for j in range(DIM)) for i in range(DIM) for sign in (1, -1)][:15]
    return 2 * torch.tensor(integer + half + axes, dtype=torch.int8)


def decode(codes: Tensor, table: Tensor) -> Tensor:
    """Rows of a table of codewords.

    Args:
        codes: `(..., k)` int16 (65,536 codewords) or uint8 (256).
        table: `(65536 or 256, 8)` int8 on the device of the codes.

    Returns:
        `(..., 8 k)` int8, the codewords times 4.
    """
    index = codes.to(torch.int32)
    if codes.dtype == torch.int16:
        index = index & 0xFFFF
    rows = table.view(torch.int64).flatten().index_select(0, index.flatten())
    return rows.view(torch.int8).view(*codes.shape[:-1], DIM * codes.shape[-1])


@dataclass(frozen=True)
class _Search:
    """Constants of the search. A class is a pattern up to permutation; the last of the 8 is the norm-12 one."""

    patterns: Tensor  # (256, 8)
    weights: Tensor  # (8, 8) score of a class from the sorted |y| (the smallest halved and signed): (rank, class)
    bias: Tensor  # (8,) minus half the squared norms
    digits: Tensor  # (8, 8) int64: pattern minus 1/2 of each class, (class, rank)
    powers: Tensor  # (8,) int64 3^i
    row: Tensor  # (6561,) int64 pattern row by digits in base 3, -1 where there is none

    @staticmethod
    @lru_cache(maxsize=8)
    def on(device: torch.device) -> "_Search":
        with torch.inference_mode(False), torch.device("cpu"):
            return _Search._build(device)

    @staticmethod
    def _build(device: torch.device) -> "_Search":
        patterns = e8p_patterns()
        classes = patterns.sort(1, descending=True).values.unique(dim=0)
        classes = classes[classes.square().sum(1).argsort(stable=True)]
        weights = classes.T.clone()
        weights[-1] = 1.0 - 2.0 * (classes.sum(1) % 2)  # a flip is wrong for one parity and right for the other
        powers = 3 ** torch.arange(DIM)
        row = torch.full((3**DIM,), -1)
        row[((patterns - 0.5).long() * powers).sum(1)] = torch.arange(len(patterns))
        bias = -classes.square().sum(1) / 2
        parts = (patterns, weights, bias, (classes - 0.5).long(), powers, row)
        return _Search(*(t.to(device) for t in parts))

    def rows(self, kind: Tensor, order: Tensor) -> Tensor:
        """Pattern rows (n,) of classes (n,) whose digits are dealt out in the order (n, 8) of falling `|y|`."""
        return self.row[(self.digits.index_select(0, kind) * self.powers[order]).sum(1)]


def nearest_e8p(x: Tensor) -> Tensor:
    """The nearest E8P codeword of each vector, exactly.

    For either shift the signs of the best codeword are those of `y = x -+ 1/4`, except for one flip where the
    parity is wrong. The 227 inner patterns are closed under permutations, and there the sorted arrangement with the
    flip at the smallest `|y_i|` is best (an exchange argument), so only one score a class is needed. The norm-12
    class is not complete: where its sorted arrangement wins but is missing, its members are compared one by one.

    Args:
        x: `(n, 8)` float32 or float64, finite.

    Returns:
        `(n,)` int16 codes.
    """
    codes = [_search_chunk(part, both=False) for part in x.split(_CHUNK)]
    return torch.cat(codes)


def rivals_e8p(x: Tensor) -> Tensor:
    """The nearest codeword of either shift, the nearer one first: `(n, 2)` int16 codes for x `(n, 8)`."""
    codes = [_search_chunk(part, both=True) for part in x.split(_CHUNK)]
    return torch.cat(codes)


def nearest_e8(x: Tensor) -> Tensor:
    """The nearest codeword of the 1-bit codebook: `(n,)` uint8 codes for x `(n, 8)`."""
    table = e8_table().to(x) / 4
    half_norm = table.square().sum(1) / 2
    codes = [torch.addmm(-half_norm, part, table.T).argmax(1) for part in x.split(_CHUNK)]
    return torch.cat(codes).to(torch.uint8)


def _search_chunk(x: Tensor, both: bool) -> Tensor:
    n = len(x)
    search = _Search.on(x.device)
    y = torch.cat([x - 0.25, x + 0.25])  # (2n, 8)
    a = y.abs()
    parity = (y < 0).sum(1) & 1  # (2n,) of the number of negative entries
    ranked, order = a.sort(1, descending=True)
    feature = torch.cat([ranked[:, :-1], (ranked[:, -1] * (0.5 - parity))[:, None]], dim=1)
    score = torch.addmm(search.bias.to(x.dtype), feature, search.weights.to(x.dtype))  # (2n, classes)
    best, kind = score.max(1)
    row = search.rows(kind, order)
    missing = torch.nonzero(row < 0).flatten()
    best[missing], row[missing] = _without_the_class(
        score[missing], order[missing], a[missing], parity[missing], search
    )
    gain = best - a.square().sum(1) / 2  # minus half the squared distance
    shift = (gain[n:] > gain[:n]).long()  # 1: the shift -1/4
    if both:
        shift = torch.cat([shift, 1 - shift])
    pick = torch.arange(n, device=x.device).repeat(len(shift) // n) + shift * n
    codes = _encode(y.index_select(0, pick), parity[pick], row[pick], shift, search)
    return codes.view(2, n).T if both else codes


def _without_the_class(
    score: Tensor, order: Tensor, a: Tensor, parity: Tensor, search: _Search
) -> tuple[Tensor, Tensor]:
    """Best score and pattern row where the norm-12 class won with a pattern that is missing.

    What is left are the other classes, and the padding patterns in their own order, each with its cheapest flip.
    """
    best, kind = score[:, :-1].max(1)
    row = search.rows(kind, order)
    padding = search.patterns[-_PADDING:].to(a.dtype)
    terms = a[:, None, :] * padding  # (k, 29, 8)
    wrong = 1 - parity[:, None]  # their sums are odd
    padding_best, index = (terms.sum(2) - 2 * wrong * terms.amin(2) - 6.0).max(1)
    use = padding_best > best
    return torch.where(use, padding_best, best), torch.where(use, index + 256 - _PADDING, row)


def _encode(y: Tensor, parity: Tensor, row: Tensor, shift: Tensor, search: _Search) -> Tensor:
    """Codes (n,) int16 of pattern rows with the signs of `y`, the cheapest one flipped where the parity is wrong."""
    pattern = search.patterns.index_select(0, row)
    wrong = (pattern.sum(1).long() + parity) & 1
    cheapest = (y.abs() * pattern).argmin(1)
    negative = (y < 0).long().scatter_add_(1, cheapest[:, None], wrong[:, None])
    bits = (negative[:, :7] & 1) << torch.arange(7, device=y.device)
    return (row << 8 | shift << 7 | bits.sum(1)).to(torch.int16)


@dataclass(frozen=True)
class Codebook:
    """One or two stages of codewords: `value = stage_1 + stage_2 / residual_scale`.

    Attributes:
        bits: Bits per weight of all stages together.
        scale: What weights of unit variance are best multiplied by before the search, when LDLQ feeds errors back.
        residual_scale: What the first stage's residual is multiplied by, None for a single stage. Part of the format.
    """

    bits: int
    scale: float
    residual_scale: float | None = None

    @property
    def code_dtypes(self) -> tuple[torch.dtype, ...]:
        """dtype of the codes of each stage; 8 weights share one code of every stage."""
        return {2: (torch.int16,), 3: (torch.int16, torch.uint8), 4: (torch.int16, torch.int16)}[self.bits]

    def quantize(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Codes of vectors `(n, 8)` float32: `(n,)` of each stage, and the decoded vectors `(n, 8)`."""
        if self.residual_scale is None:
            codes = [nearest_e8p(x)]
        elif self.bits == 3:
            first = nearest_e8p(x)
            codes = [first, nearest_e8((x - _quarters(first) / 4) * self.residual_scale)]
        else:
            codes = self._joint(x, self.residual_scale)
        return codes, self.decode(codes)

    def _joint(self, x: Tensor, residual_scale: float) -> list[Tensor]:
        """Two E8P stages: the nearest first codeword of either shift is tried, since the nearer one leaves the larger
        residual error often enough to cost 5 % of the mean squared error.
        """
        n = len(x)
        first = rivals_e8p(x).T.flatten()  # (2n,)
        rest = x.repeat(2, 1) - _quarters(first) / 4
        second = nearest_e8p(rest * residual_scale)
        error = (rest - _quarters(second) / (4 * residual_scale)).square().sum(1).view(2, n)
        pick = (error[1] < error[0]).long() * n + torch.arange(n, device=x.device)
        return [first[pick], second[pick]]

    def decode(self, codes: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of the codes of each stage: `(..., 8 k)` for `(..., k)`, and `(n, 8)` for `(n,)`.

        In half precisions the second stage is added in float32, and the sum rounded once.
        """
        if self.residual_scale is None:
            return _quarters(codes[0], dtype).mul_(0.25)
        value = _quarters(codes[0]).add_(_quarters(codes[1]), alpha=1 / self.residual_scale)
        return value.mul_(0.25).to(dtype)


CODEBOOKS: dict[int, Codebook] = {2: Codebook(2, 0.98), 3: Codebook(3, 0.98, 2.04), 4: Codebook(4, 0.88, 3.7)}


# A plain dictionary, since torch.compile reads from one without breaking the graph.
_TABLES: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _table_on(dtype: torch.dtype, device: torch.device) -> Tensor:
    key = (dtype, device)
    if key not in _TABLES:
        # The cache outlives the caller's modes: no inference tensor, no default device may end up in it.
        with torch.inference_mode(False), torch.device("cpu"):
            _TABLES[key] = (e8p_table() if dtype == torch.int16 else e8_table()).to(device)
    return _TABLES[key]


def _quarters(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codewords of one stage times 4."""
    flat = codes[:, None] if codes.ndim == 1 else codes
    return decode(flat, _table_on(codes.dtype, codes.device)).to(dtype)
