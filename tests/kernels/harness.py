"""What the tests of all kernels share: poisoned outputs, guard regions, and the comparison with the reference."""

from contextlib import contextmanager

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative to the largest magnitude of what is expected: a rounding or two of the dtype.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

_GUARD = 64  # elements on either side


@contextmanager
def poisoned():
    """`torch.empty` and its kin give NaN (or the largest integer), so that what a kernel forgets to write shows.

    This is what torch does itself in its deterministic mode.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def guarded(x, poison=None):
    """A copy of x, contiguous, amid elements that no kernel may read: NaN, or the largest integer.

    What a kernel reads out of bounds and uses then spoils its result. `guards_intact` tells whether it wrote there.
    """
    if poison is None:
        poison = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
    buffer = torch.full((x.numel() + 2 * _GUARD,), poison, dtype=x.dtype, device=x.device)
    inside = buffer[_GUARD : _GUARD + x.numel()]
    inside.copy_(x.reshape(-1))
    return inside.view(x.shape)


def guards_intact(x):
    """Whether nothing was written around a tensor that `guarded` made."""
    base = x._base if x._base is not None else x
    while base._base is not None:
        base = base._base
    edges = torch.cat([base[:_GUARD], base[-_GUARD:]])
    poison = torch.full_like(edges, float("nan") if edges.is_floating_point() else torch.iinfo(edges.dtype).max)
    return torch.equal(edges.view(torch.uint8), poison.view(torch.uint8))


def assert_close(actual, expected, tolerance=None):
    """Equal shapes and dtypes, no NaN, and a difference of at most `tolerance` times the largest expected magnitude."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if expected.numel() == 0:
        return
    assert torch.isfinite(actual).all()
    tolerance = TOLERANCES[expected.dtype] if tolerance is None else tolerance
    scale = expected.double().abs().max().clamp(min=1e-30)
    error = ((actual.double() - expected.double()).abs().max() / scale).item()
    assert error <= tolerance, f"relative error {error:.3g} above {tolerance:.3g}"
