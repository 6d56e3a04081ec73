"""Orthonormal Hadamard transforms of any length, for the incoherence processing of QuIP#.

A length `n = 2^k * odd` is rotated by `H_n = S_{2^j} (x) B`: a Sylvester matrix and a base, applied one Kronecker
factor at a time, so one vector costs `O(n log n + n m)` for a base of order `m` and nothing of size `n x n` is
ever built. The base is the smallest Hadamard matrix of order `odd * 2^i` that can be constructed here: Sylvester,
Paley I (`q + 1`, prime `q = 3 mod 4`), Paley II (`2 (q + 1)`, prime `q = 1 mod 4`), or Williamson's array for
52, 92, 100 and 172. Where there is none (odd lengths, `2 * odd`, and a few orders above 200), the odd factor is
rotated by the orthonormal discrete Hartley transform `cos + sin`, computed with an FFT. Its entries are at most
`sqrt(2 / odd)`: up to a factor of sqrt(2) it spreads outliers as well as a Hadamard matrix, and being in closed form
it is the same on every machine, so a checkpoint has to store no rotation.

Shapes: n length of the rotated (last) dimension, m order of the base, r all leading dimensions together.
"""

import hashlib
import math

import torch
from torch import Tensor

__all__ = ["dense_base", "hadamard_matrix", "hadamard_transform", "random_signs"]

# First rows of the four symmetric circulant blocks of Williamson's array, for the multiples of 4 that Paley's
# constructions over prime fields miss: bit i of a mask says that entries i and -i are -1.
_WILLIAMSON: dict[int, tuple[int, int, int, int]] = {
    13: (0x22, 0x72, 0x72, 0x5C),
    23: (0x56, 0x2A6, 0x338, 0xE36),
    25: (0x72, 0x3BA, 0x65A, 0x1A6C),
    43: (0x2450CE, 0x3CDA1C, 0x342B28, 0x135E04),
}
# A plain dictionary, since torch.compile reads from one without breaking the graph.
_ROTATIONS: dict[tuple[int, torch.dtype, torch.device], tuple[list[Tensor], int]] = {}
_MAX_BASE = 1024  # a larger dense base would cost more than the Hartley transform
_MAX_FACTOR = 64  # widest dense factor made of small ones: above it the work grows, below it the calls do


def hadamard_matrix(order: int) -> Tensor | None:
    """A Hadamard matrix: entries +-1, `H H^T = order * I`.

    Args:
        order: number of rows.

    Returns:
        `(order, order)` float64 on the CPU, or None where no construction known here gives this order (always so
        when `order > 2` is not a multiple of 4).

    Raises:
        ValueError: `order` is below 1.
    """
    if order < 1:
        raise ValueError(f"a Hadamard matrix has an order of at least 1, got {order}")
    odd, twos = _split(order)
    for i in range(twos + 1):
        base = _base_matrix(odd << i)
        if base is not None:
            return torch.kron(_sylvester(1 << (twos - i)), base)
    return None


def dense_base(n: int) -> Tensor | None:
    """The base B of `H_n = Sylvester (x) B`, what a kernel needs to rotate as `hadamard_transform` does.

    Args:
        n: a length, at least 1.

    Returns:
        `(m, m)` int8 of +-1 on the CPU, the smallest base there is, of order 1 where n is a power of two. None where
        the odd factor of n is rotated by the Hartley transform.
    """
    if _plan(n)[1] > 1:
        return None
    odd, twos = _split(n)
    order = next(odd << i for i in range(twos + 1) if _base_exists(odd << i))
    base = _base_matrix(order)
    return None if base is None else base.to(torch.int8)


def hadamard_transform(x: Tensor, transpose: bool = False, dim: int = -1) -> Tensor:
    """Rotate one dimension by the orthonormal `H_n` of this module. Linear and differentiable.

    Args:
        x: `(..., n, ...)`, floating point. Half precisions are rotated in float32 and rounded once at the end.
        transpose: apply `H_n^T`, the inverse, instead of `H_n`.
        dim: the dimension of length n.

    Returns:
        A tensor of the shape and dtype of `x`.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: `x` has no dimensions, or an empty one to rotate.
    """
    if not x.is_floating_point():
        raise TypeError(f"the Hadamard transform needs a floating-point tensor, got {x.dtype}: cast it first")
    if x.ndim == 0 or x.shape[dim] == 0:
        raise ValueError(f"the Hadamard transform needs a non-empty dimension, got shape {tuple(x.shape)}, dim {dim}")
    n = x.shape[dim]
    columns = math.prod(x.shape[dim % x.ndim + 1 :])
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    factors, hartley = _rotation(n, dtype, x.device)
    y = x.to(dtype)
    inner = columns
    if hartley > 1:  # symmetric, hence its own transpose
        spectrum = torch.fft.fft(y.reshape(-1, hartley, columns), dim=1, norm="ortho")
        y = spectrum.real - spectrum.imag
        inner *= hartley
    for forward_factor in reversed(factors):
        factor = forward_factor.T if transpose else forward_factor
        order = len(factor)
        # One matrix product where the factor is innermost, a batch of them where it is not.
        y = y.reshape(-1, order) @ factor.T if inner == 1 else factor @ y.reshape(-1, order, inner)
        inner *= order
    return y.reshape(x.shape).to(x.dtype)


def random_signs(seed: int, stream: str, length: int) -> Tensor:
    """`(length,)` float32 of +-1 that depends on the arguments only: on no library, version or device.

    They are the bits of SHAKE-256 of the seed and the stream's name, so that a checkpoint can store the seed instead.
    """
    digest = hashlib.shake_256(f"hf_efficiency/{seed}/{stream}".encode()).digest(-(-length // 8))
    octets = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    bits = (octets[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return 1.0 - 2.0 * bits.flatten()[:length].float()


def _split(n: int) -> tuple[int, int]:
    """`n = odd * 2^twos`."""
    twos = (n & -n).bit_length() - 1
    return n >> twos, twos


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _plan(n: int) -> tuple[tuple[int, ...], int]:
    """Orders of the dense factors, outermost first, and the length of the Hartley factor (1: none)."""
    odd, twos = _split(n)
    base, hartley = 1, odd
    for i in range(twos + 1):
        if odd << i <= _MAX_BASE and _base_exists(odd << i):
            base, hartley, twos = odd << i, 1, twos - i
            break
    while twos and 1 < base <= _MAX_FACTOR // 2:
        base, twos = 2 * base, twos - 1
    widest = _MAX_FACTOR.bit_length() - 1
    pieces = -(-twos // widest)
    orders = [1 << (twos // pieces + (i < twos % pieces)) for i in range(pieces)]
    return tuple(orders + [base] * (base > 1)), hartley


def _rotation(n: int, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], int]:
    """Orthonormal dense factors of `H_n`, outermost first, and the length of its Hartley factor (1: none)."""
    key = (n, dtype, device)
    if key not in _ROTATIONS:
        # The cache outlives the caller's modes: no inference tensor, no default device may end up in it.
        with torch.inference_mode(False), torch.device("cpu"):
            orders, hartley = _plan(n)
            matrices = [(order, hadamard_matrix(order)) for order in orders]
            factors = [(m / math.sqrt(order)).to(device, dtype) for order, m in matrices if m is not None]
        _ROTATIONS[key] = factors, hartley
    return _ROTATIONS[key]


def _sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def _base_exists(m: int) -> bool:
    if m in (1, 2):
        return True
    return m % 4 == 0 and (_is_prime(m - 1) or (m % 8 == 4 and _is_prime(m // 2 - 1)) or m // 4 in _WILLIAMSON)


def _base_matrix(m: int) -> Tensor | None:
    """Order `m` by one of the constructions that do not double another one."""
    if not _base_exists(m):
        return None
    if m <= 2:
        return _sylvester(m)
    if _is_prime(m - 1):
        return _paley_one(m - 1)
    if m % 8 == 4 and _is_prime(m // 2 - 1):
        return _paley_two(m // 2 - 1)
    return _williamson(m // 4)


def _jacobsthal(q: int) -> Tensor:
    """`(q, q)`, entry `(i, j)` the quadratic character of `i - j` modulo the prime `q`."""
    character = -torch.ones(q, dtype=torch.float64)
    character[torch.arange(q) ** 2 % q] = 1.0
    character[0] = 0.0
    index = torch.arange(q)
    return character[(index[:, None] - index[None, :]) % q]


def _bordered(q: int, corner: float) -> Tensor:
    """Jacobsthal matrix with a border of ones: a conference matrix, up to the sign of the first column."""
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 0] = 0.0
    matrix[1:, 0] = corner
    matrix[1:, 1:] = _jacobsthal(q)
    return matrix


def _paley_one(q: int) -> Tensor:
    return torch.eye(q + 1, dtype=torch.float64) + _bordered(q, -1.0)


def _paley_two(q: int) -> Tensor:
    entry = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(_bordered(q, 1.0), entry) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)


def _williamson(t: int) -> Tensor:
    index = torch.arange(t)
    shift = (index[:, None] - index[None, :]) % t
    blocks = []
    for mask in _WILLIAMSON[t]:
        row = torch.tensor([1.0 - 2.0 * (mask >> min(i, t - i) & 1) for i in range(t)], dtype=torch.float64)
        blocks.append(row[shift])
    a, b, c, d = blocks
    rows = [[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]
    return torch.cat([torch.cat(row, dim=1) for row in rows])
