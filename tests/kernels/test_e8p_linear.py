"""Products with lattice codes: the kernels against their reference, and its tables against the quantizer's."""

import pytest
import torch

from hf_efficiency.kernels.e8p_linear import e8p_decode, e8p_linear, e8p_tables, kernel, op, reference
from hf_efficiency.quantization.e8p import CODEBOOKS, decode, e8p_table
from tests.kernels.harness import DTYPES, TOLERANCES, assert_close, guarded, guards_intact, poisoned

PATTERNS, ROOTS = e8p_tables()


def stages(bits, d_out, c):
    """codes, residual, patterns, roots, residual_scale: with guards, and every code as likely as another."""
    codes, other = (guarded(torch.randint(-(1 << 15), 1 << 15, (d_out, c)).to(torch.int16)) for _ in range(2))
    residual = {2: None, 3: guarded((other & 255).to(torch.uint8)), 4: other}[bits]
    roots = guarded(ROOTS) if bits == 3 else None
    return codes, residual, guarded(PATTERNS), roots, CODEBOOKS[bits].residual_scale or 1.0


def keywords(bits, d_out, c):
    """The same for the public function."""
    codes, residual, patterns, roots, scale = stages(bits, d_out, c)
    return (codes, residual), {"patterns": patterns, "roots": roots, "residual_scale": scale}


def test_every_code_decodes_as_in_the_quantizer():
    codes = torch.arange(1 << 16).view(256, 256).to(torch.int16)
    expected = decode(codes, e8p_table()).float() / 4
    for module in (reference, kernel):
        assert torch.equal(module.e8p_decode(codes, None, PATTERNS, None, 1.0, torch.float32), expected)


@pytest.mark.parametrize("bits", [3, 4])
def test_both_stages_decode_as_in_the_quantizer(bits):
    codes, residual, patterns, roots, scale = stages(bits, 4, 256)
    if bits == 3:
        residual[0] = torch.arange(256)
    expected = CODEBOOKS[bits].decode([codes, residual])
    for module in (reference, kernel):
        assert_close(module.e8p_decode(codes, residual, patterns, roots, scale, torch.float32), expected, 1e-6)


def test_decoding_by_hand():
    """Pattern 0 is eight times 1/2 (an even sum), with coordinate 0 negative, hence also 7, and the shift -1/4."""
    code = torch.tensor([[0x81]]).to(torch.int16)
    expected = torch.tensor([[-0.75] + [0.25] * 6 + [-0.75]])
    assert torch.equal(e8p_decode(code, patterns=PATTERNS), expected)
    # Row 1 ends in 3/2: an odd sum, so that an even number of negatives needs one more.
    assert torch.equal(
        e8p_decode(torch.tensor([[0x0100]]).short(), patterns=PATTERNS)[0, 6:], torch.tensor([0.75, -1.25])
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("rows", "d_out", "c"), [(1, 1, 1), (1, 37, 21), (1, 5, 300), (2, 67, 37), (17, 3, 1), (66, 9, 5)]
)
def test_kernel(rows, d_out, c, bits, dtype):
    x, arguments = guarded(torch.randn(rows, 8 * c).to(dtype)), stages(bits, d_out, c)
    with poisoned():
        y = kernel.e8p_linear(x, *arguments)
    expected = reference.e8p_linear(x.double(), *arguments).to(dtype)
    assert_close(y, expected, 2 * TOLERANCES[dtype])
    assert all(guards_intact(t) for t in (x, *arguments[:4]) if t is not None)


@pytest.mark.parametrize("bits", [2, 4])
def test_parts_of_k_are_summed(bits, monkeypatch):
    """34 codes are cut into 4 parts, the last of them shorter."""
    monkeypatch.setattr(kernel, "_TILE_CODES", 2)
    assert kernel._splits(1, 34) == (4, 10)
    x, arguments = torch.randn(3, 272), stages(bits, 5, 34)
    with poisoned():
        y = kernel.e8p_linear(x, *arguments)
    assert_close(y, reference.e8p_linear(x, *arguments))
    assert torch.equal(y, kernel.e8p_linear(x, *arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_and_the_gradient_decode_blocks(dtype, monkeypatch):
    for module in (kernel, reference):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", 8 * 40 * 3)
    x, g, arguments = torch.randn(300, 40).to(dtype), torch.randn(300, 19).to(dtype), stages(3, 19, 5)
    dense = CODEBOOKS[3].decode(list(arguments[:2]))
    for module in (kernel, reference):
        with poisoned():
            y, grad = module.e8p_linear(x, *arguments), module.e8p_linear_backward(g, *arguments)
        assert_close(y, (x.float() @ dense.T).to(dtype))
        assert_close(grad, (g.float() @ dense).to(dtype))


def test_zero_rows_and_batch_dimensions():
    stored, named = keywords(2, 6, 3)
    assert e8p_linear(torch.zeros(0, 24), *stored, **named).shape == (0, 6)
    assert not e8p_linear(torch.zeros(2, 24), *stored, **named).any()
    x = torch.randn(24, 2, 3).permute(1, 2, 0)
    dense = e8p_decode(*stored, **named)
    assert_close(e8p_linear(x, *stored, **named), x @ dense.T)
    wide = torch.randn(2, 48)
    assert_close(e8p_linear(wide[:, ::2], *stored, **named), wide[:, ::2] @ dense.T)
    assert_close(e8p_linear(wide[:, 3:27], stored[0].T.contiguous().T, **named), wide[:, 3:27] @ dense.T)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rows", [1, 5])
def test_gradient(bits, rows):
    stored, named = keywords(bits, 7, 3)
    x, g = torch.randn(rows, 24, requires_grad=True), torch.randn(rows, 7)
    (grad,) = torch.autograd.grad(e8p_linear(x, *stored, **named), x, g)
    assert_close(grad, g @ e8p_decode(*stored, **named))


def test_operators_are_sound():
    x = torch.randn(3, 24, requires_grad=True)
    torch.library.opcheck(op._e8p_linear, (x, *stages(3, 6, 3)))
    torch.library.opcheck(op._e8p_linear_backward, (torch.randn(3, 6), *stages(4, 6, 3)))
    torch.library.opcheck(op._e8p_decode, (*stages(2, 6, 3), torch.bfloat16))


def test_compiles_without_a_break():
    stored, named = keywords(4, 6, 3)
    step = torch.compile(lambda t: e8p_linear(t, *stored, **named) + 1, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 24)
    assert_close(step(x), e8p_linear(x, *stored, **named) + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 24).long()}, r"int64.*cast it"),
        ({"x": torch.zeros(2, 16)}, r"x has shape \(2, 16\), and codes \(6, 3\)"),
        ({"x": torch.zeros(2, 24, device="meta")}, "x lies on meta and codes on cpu"),
        ({"codes": torch.zeros(6, 3).int()}, r"int32 of shape \(6, 3\).*int16"),
        ({"residual": torch.zeros(6, 3).int()}, r"residual is torch\.int32"),
        ({"residual": torch.zeros(6, 2).short()}, r"residual has shape \(6, 2\), codes \(6, 3\)"),
        ({"residual": torch.zeros(6, 3).short(), "residual_scale": 0.0}, r"residual_scale=0\.0 must be positive"),
        (
            {"residual": torch.zeros(6, 3, dtype=torch.uint8)},
            r"roots go with a uint8 residual.*torch\.uint8, roots=False",
        ),
        ({"roots": ROOTS}, "got no residual, roots=True"),
        ({"patterns": PATTERNS[:128]}, r"patterns is torch\.int32 of shape \(128,\): take it from e8p_tables"),
        ({"patterns": PATTERNS.to("meta")}, "codes lie on cpu and patterns on meta"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"x": torch.zeros(2, 24), "codes": torch.zeros(6, 3).short(), "patterns": PATTERNS}
    with pytest.raises(ValueError, match=message):
        e8p_linear(**(good | change))


def test_bad_dtype_is_named():
    with pytest.raises(ValueError, match=r"dtype=torch\.int8"):
        e8p_decode(torch.zeros(6, 3).short(), patterns=PATTERNS, dtype=torch.int8)
