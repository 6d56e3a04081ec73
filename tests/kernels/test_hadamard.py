"""The Hadamard kernel against its reference, and both against the rotation that checkpoints are made with."""

from itertools import product

import pytest
import torch

from hf_efficiency.kernels.hadamard import hadamard, kernel, op, reference
from hf_efficiency.quantization.hadamard import hadamard_matrix, hadamard_transform
from tests.kernels.harness import DTYPES, assert_close, guarded, guards_intact, poisoned

# Length and order of the base: none, one block and several, several vectors a program, blocks of 128, bases above 128.
SIZES = [(1, 1), (2, 1), (8, 1), (64, 1), (256, 1), (12, 12), (40, 20), (96, 12), (576, 36), (8192, 1), (3584, 28)]
LONG = [(16384, 1), (28672, 28), (344, 172), (68 * 128, 68)]


def base_of(m):
    """(m, m) int8, or None for 1."""
    return None if m == 1 else guarded(hadamard_matrix(m).to(torch.int8))


def vector(kind, n):
    """What multiplies a side: nothing, signs, or a real vector."""
    if kind == "none":
        return None
    return guarded(torch.randn(n).sign().to(torch.int8) if kind == "signs" else torch.randn(n))


def compare(rows, n, m, kinds, dtype, n_in=None, n_out=None, transpose=False):
    n_in, n_out = n_in or n, n_out or n
    x, base = guarded(torch.randn(rows, n_in).to(dtype)), base_of(m)
    before, after = vector(kinds[0], n_in), vector(kinds[1], n_out)
    with poisoned():
        y = kernel.hadamard(x, base, before, after, 0.7, transpose, n, n_out)
    assert_close(y, reference.hadamard(x, base, before, after, 0.7, transpose, n, n_out))
    assert all(guards_intact(t) for t in (x, base, before, after) if t is not None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_kernel(n, m, dtype):
    compare(3, n, m, ("signs", "real"), dtype)
    compare(1, n, m, ("real", "none"), dtype, transpose=True)


@pytest.mark.parametrize(("n", "m"), LONG)
def test_long_vectors_and_large_bases(n, m):
    compare(2, n, m, ("signs", "real"), torch.bfloat16, transpose=True)


@pytest.mark.parametrize(("n", "m"), [(64, 1), (8192, 1), (3584, 28), (136, 68), (344, 172), (68 * 128, 68)])
@pytest.mark.parametrize("kinds", [("signs", "none"), ("real", "real")])
def test_cards_that_hold_one_block(n, m, kinds, monkeypatch):
    """Each block of a vector has a program of its own, which reads all of them."""
    monkeypatch.setattr(kernel, "_roomy", lambda _: False)
    compare(2, n, m, kinds, torch.bfloat16)
    compare(3, n, m, kinds, torch.float32, n_in=n - 3, n_out=n - 2, transpose=True)


def test_room_by_card():
    assert kernel._roomy(None)  # AMD
    assert [kernel._roomy((major, 0)) for major in (8, 9, 10, 12)] == [False, True, True, False]
    assert not kernel._plan(14336, 28).SPREAD
    assert kernel._plan(14336, 28, roomy=False).SPREAD
    assert kernel._plan(14336, 28, exact=False).SPREAD


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_and_cropping(dtype):
    compare(5, 24, 12, ("signs", "signs"), dtype, n_in=21, n_out=22)
    compare(70, 128, 1, ("none", "real"), dtype, n_in=1, n_out=127)


def test_more_than_registers_hold_takes_the_reference():
    assert kernel._plan(1 << 17, 1) is None
    compare(1, 1 << 17, 1, ("none", "none"), torch.bfloat16)


def test_every_length_is_cut_into_its_factors():
    lengths = [(4096, 1), (14336, 28), (11008, 172), (13824, 108), (18944, 148), (53248, 52), (29568, 924), (6, 3)]
    for (n, m), exact, roomy in product(lengths, (False, True), (False, True)):
        plan = kernel._plan(n, m, exact, roomy)
        assert n == plan.T * plan.A * plan.K
        assert plan.K % m == 0
        assert plan.K <= plan.KP * plan.CHUNKS


@pytest.mark.parametrize(("n", "m"), [(1, 1), (16, 1), (12, 12), (40, 20), (96, 12), (56, 28), (344, 172)])
@pytest.mark.parametrize("transpose", [False, True])
def test_reference_is_the_rotation_of_checkpoints(n, m, transpose):
    x, sv, su = torch.randn(3, n), torch.randn(n), torch.randn(n)
    base = base_of(m)
    expected = hadamard_transform(x * sv, transpose=transpose) * (su * 0.3)
    assert_close(reference.hadamard(x, base, sv, su, 0.3, transpose, n, n), expected)
    dense = hadamard_matrix(n).float() / n**0.5
    plain = reference.hadamard(x, base, None, None, 1.0, transpose, n, n)
    assert_close(plain, x @ (dense if transpose else dense.T))


def test_float32_is_as_exact_as_its_rounding():
    x = torch.randn(2, 1024)
    expected = reference.hadamard(x.double(), None, None, None, 1.0, False, 1024, 1024)
    dense = hadamard_matrix(1024) / 32
    assert_close(kernel.hadamard(x, None, None, None, 1.0, False, 1024, 1024), expected.float(), 1e-6)
    assert_close(expected, x.double() @ dense.T, 1e-6)


def test_batch_dimensions_strides_and_no_rows():
    x = torch.randn(64, 2, 3).permute(1, 2, 0)
    assert_close(hadamard(x), hadamard_transform(x))
    wide = torch.randn(3, 200)[:, 5:69]
    assert_close(hadamard(wide), hadamard_transform(wide.contiguous()))
    assert hadamard(torch.zeros(0, 64)).shape == (0, 64)
    assert hadamard(torch.zeros(2, 0, 24), base_of(12), out_length=23).shape == (2, 0, 23)


@pytest.mark.parametrize("transpose", [False, True])
def test_gradient_is_that_of_the_torch_formula(transpose):
    x = torch.randn(2, 21, requires_grad=True)
    sv, su, g = torch.randn(21).sign(), torch.randn(22), torch.randn(2, 22)
    padded = torch.nn.functional.pad(x * sv, (0, 3))
    expected = hadamard_transform(padded, transpose=transpose)[:, :22] * su * 0.5
    y = hadamard(
        x, base_of(12), before=sv.to(torch.int8), after=su, scale=0.5, transpose=transpose, length=24, out_length=22
    )
    assert_close(y.detach(), expected.detach())
    (actual,), (wanted,) = torch.autograd.grad(y, x, g), torch.autograd.grad(expected, x, g)
    assert_close(actual, wanted)


def test_operator_is_sound():
    x = torch.randn(2, 24, requires_grad=True)
    signs = torch.randn(24).sign().to(torch.int8)
    torch.library.opcheck(op._hadamard, (x, base_of(12), signs, torch.randn(23), 0.5, True, 24, 23))
    torch.library.opcheck(op._hadamard, (x[:, :16], None, None, None, 1.0, False, 16, 16))


def test_compiles_without_a_break():
    x = torch.randn(3, 24)
    base, after = base_of(12), torch.randn(24)
    step = torch.compile(lambda t: hadamard(t, base, after=after) + 1, fullgraph=True, backend="aot_eager")
    assert_close(step(x), hadamard(x, base, after=after) + 1)


def test_bad_input_is_named():
    x = torch.zeros(2, 24)
    with pytest.raises(ValueError, match=r"int64.*cast it"):
        hadamard(x.long())
    with pytest.raises(ValueError, match=r"shape \(2, 0\).*empty"):
        hadamard(torch.zeros(2, 0))
    with pytest.raises(ValueError, match=r"length 24 is no power of two times the base's order 1"):
        hadamard(x)
    with pytest.raises(ValueError, match=r"torch.float64 of shape \(12, 12\).*square int8"):
        hadamard(x, hadamard_matrix(12))
    with pytest.raises(ValueError, match="x lies on cpu and base on meta"):
        hadamard(x, base_of(12).to("meta"))
    with pytest.raises(ValueError, match=r"24 columns and the result 17.*length=16"):
        hadamard(x, length=16, out_length=17)
    with pytest.raises(ValueError, match=r"before has shape \(23,\).*\(24,\)"):
        hadamard(x, base_of(12), before=torch.ones(23))
    with pytest.raises(ValueError, match=r"after is torch\.float16"):
        hadamard(x, base_of(12), after=torch.ones(24, dtype=torch.float16))
    with pytest.raises(ValueError, match="x lies on cpu and after on meta"):
        hadamard(x, base_of(12), after=torch.ones(24, device="meta"))
    with pytest.raises(ValueError, match="before asks for a gradient"):
        hadamard(x, base_of(12), before=torch.ones(24, requires_grad=True))
