"""Lookup-table products: the kernels against their reference, and that against the quantizer that writes the format."""

import pytest
import torch

from hf_efficiency.kernels.lut_linear import kernel, lut_linear, op, reference, row_lut_linear
from hf_efficiency.quantization.nf4 import double_quantize, dynamic_map, nf4_table, quantize_nf4
from tests.kernels.harness import DTYPES, assert_close, guarded, guards_intact, poisoned

# Rows, d_in, d_out, block size. First whole chunks of 32 weights: few rows, with a ragged last block, blocks that cross
# rows, several chunks a thread, and many rows; then rows that begin within a block, within a chunk, within a byte.
ALIGNED = [(1, 64, 5, 64), (2, 96, 7, 64), (3, 1056, 3, 128), (17, 96, 33, 32), (5, 160, 9, 512)]
RAGGED = [(1, 40, 5, 32), (3, 33, 9, 64), (18, 7, 3, 32), (1, 1, 1, 64)]


def _weight(d_in, d_out, block_size, double_quant):
    """The six tensors of a random NF4 weight, by the order of the operator's arguments."""
    weight = torch.randn(d_out, d_in)
    packed, absmax = quantize_nf4(weight, block_size)
    if not double_quant:
        return [guarded(packed), guarded(nf4_table()), guarded(absmax), None, None, None]
    codes, nested, offset = double_quantize(absmax)
    return [guarded(t) for t in (packed, nf4_table(), codes, dynamic_map(), nested, offset)]


def _rows(d_in, d_out, dtype):
    """Random codes and tables of a weight with a codebook a row."""
    packed = torch.randint(0, 256, (d_out, d_in // 2), dtype=torch.uint8)
    return [guarded(packed), guarded(torch.randn(d_out, 16).to(dtype)), None, None, None, None]


def _both_ways(n, d_in, d_out, weight, block_size, dtype, bias=None):
    x, grad = guarded(torch.randn(n, d_in).to(dtype)), guarded(torch.randn(n, d_out).to(dtype))
    with poisoned():
        y = kernel.linear(x, *weight, bias, d_out, block_size)
        grad_x = kernel.linear_backward(grad, *weight, d_in, block_size)
    assert_close(y, reference.linear(x, *weight, bias, d_out, block_size))
    assert_close(grad_x, reference.linear_backward(grad, *weight, d_in, block_size))
    assert all(guards_intact(t) for t in (x, grad, *weight) if t is not None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("n", "d_in", "d_out", "block_size"), ALIGNED + RAGGED)
def test_one_table(n, d_in, d_out, block_size, double_quant, dtype):
    bias = guarded(torch.randn(d_out).to(dtype)) if double_quant else None
    _both_ways(n, d_in, d_out, _weight(d_in, d_out, block_size, double_quant), block_size, dtype, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d_in", "d_out"), [(1, 64, 5), (4, 96, 3), (17, 64, 33), (2, 38, 5)])
@pytest.mark.parametrize("table", [torch.float16, torch.float32], ids=str)
def test_a_table_a_row(n, d_in, d_out, table, dtype):
    _both_ways(n, d_in, d_out, _rows(d_in, d_out, table), 32, dtype, torch.randn(d_out))


def test_the_reference_by_hand():
    """Codes 1, 2, 3 of a table of squares; the last element stands alone in the high nibble; scales 10 and 100."""
    table = torch.arange(16.0).square()
    packed = torch.tensor([0x12, 0x30], dtype=torch.uint8)
    scale = torch.tensor([10.0])
    weight = reference.dense(packed, table, scale, None, None, None, 1, 3, 32)
    assert weight.tolist() == [[10.0, 40.0, 90.0]]
    scale = torch.tensor([7, 9], dtype=torch.uint8)
    nested_map = torch.zeros(256)
    nested_map[7], nested_map[9] = 0.5, 0.25
    packed = torch.full((17,), 0x11, dtype=torch.uint8)
    weight = reference.dense(packed, table, scale, nested_map, torch.tensor([4.0]), torch.tensor(10.0), 2, 17, 32)
    assert weight.view(-1).tolist() == [12.0] * 32 + [11.0] * 2
    tables = torch.stack([torch.arange(16.0), -torch.arange(16.0)])
    packed = torch.tensor([[0x1F], [0xF1]], dtype=torch.uint8)
    assert reference.dense(packed, tables, None, None, None, None, 2, 2, 32).tolist() == [[1.0, 15.0], [-15.0, -1.0]]


def test_split_sums_and_strided_rows():
    """Depth beyond a tile is shared by programs; rows of x lie apart, or its columns do."""
    weight = _weight(544, 6, 64, True)
    x = torch.randn(6, 2 * 544)
    for view in (x[:, :544], x[:, ::2]):
        expected = reference.linear(view, *weight, None, 6, 64)
        for n in (2, 6):
            assert_close(kernel.linear(view[:n], *weight, None, 6, 64), expected[:n])
    grad = torch.randn(5, 70).T
    weight = _weight(32, 5, 32, False)
    assert_close(kernel.linear_backward(grad, *weight, 32, 32), reference.linear_backward(grad, *weight, 32, 32))


def test_codes_at_an_odd_address():
    """A packed weight that begins within 16 bytes of storage takes the path without wide loads."""
    packed, *rest = _weight(64, 3, 64, False)
    moved = torch.cat([torch.zeros(1, dtype=torch.uint8), packed.view(-1)])[1:]
    x = torch.randn(2, 64)
    assert_close(kernel.linear(x, moved, *rest, None, 3, 64), reference.linear(x, packed, *rest, None, 3, 64))


def _arguments(d_in, d_out, double_quant=True):
    packed, table, absmax, *nested = _weight(d_in, d_out, 32, double_quant)
    names = ("nested_map", "nested_absmax", "nested_offset") if double_quant else ()
    return (packed, table, absmax), {"out_features": d_out, "block_size": 32, **dict(zip(names, nested, strict=False))}


def test_batch_dimensions_zero_rows_and_gradients():
    args, settings = _arguments(32, 5)
    bias = torch.randn(5, requires_grad=True)
    x = torch.randn(2, 3, 32, requires_grad=True)
    g = torch.randn(2, 3, 5)
    y = lut_linear(x, *args, bias, **settings)
    nested = [settings[k] for k in ("nested_map", "nested_absmax", "nested_offset")]
    weight = reference.dense(*args, *nested, 5, 32, 32)
    expected = torch.nn.functional.linear(x, weight, bias)
    assert_close(y.detach(), expected.detach())
    wanted = torch.autograd.grad(expected, (x, bias), g)
    for actual, other in zip(torch.autograd.grad(y, (x, bias), g), wanted, strict=True):
        assert_close(actual, other)
    empty = torch.zeros(0, 32, requires_grad=True)
    y = lut_linear(empty, *args, **settings)
    y.sum().backward()
    assert y.shape == (0, 5)
    assert empty.grad.shape == (0, 32)
    packed, tables, *_ = _rows(6, 3, torch.float16)
    assert row_lut_linear(torch.randn(6), packed, tables).shape == (3,)


def test_operators_are_sound():
    (packed, table, absmax), settings = _arguments(32, 3)
    nested = [settings[k] for k in ("nested_map", "nested_absmax", "nested_offset")]
    x = torch.randn(2, 32, requires_grad=True)
    torch.library.opcheck(op._linear, (x, packed, table, absmax, *nested, torch.randn(3), 3, 32))
    torch.library.opcheck(op._linear_backward, (torch.randn(2, 3), packed, table, absmax, *nested, 32, 32))


def test_compiles_without_graph_break():
    args, settings = _arguments(32, 3)
    packed, tables, *_ = _rows(32, 3, torch.float32)

    def both(x):
        return lut_linear(x, *args, **settings) + row_lut_linear(x, packed, tables)

    x = torch.randn(2, 32)
    assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 33}, "block_size=33 must be one of 32, 64"),
        ({"nested_map": None}, "all or none; nested_map is missing"),
        ({"nested_map": torch.zeros(16)}, r"nested_map is torch.float32 of shape \(16,\).*\(256,\)"),
        ({"out_features": 4}, r"absmax is torch.uint8 of shape \(5,\).*shape \(4,\)"),
        ({"packed": torch.zeros(3, dtype=torch.uint8)}, r"packed holds 3 elements.*\(5, 32\) is 80 of torch.uint8"),
        ({"packed": torch.zeros(80)}, "packed holds 80 elements of torch.float32"),
        ({"table": torch.zeros(16).half()}, r"table is torch.float16 of shape \(16,\); it must be torch.float32"),
        ({"x": torch.zeros(2, 32, dtype=torch.double)}, "x is torch.float64: cast it"),
        ({"bias": torch.zeros(4)}, r"bias is torch.float32 of shape \(4,\).*\(5,\)"),
        ({"bias": torch.zeros(5, device="meta")}, "x lies on cpu and bias on meta"),
    ],
)
def test_bad_input_is_named(change, message):
    args, settings = _arguments(32, 5)
    settings |= dict(zip(("packed", "table", "absmax"), args, strict=True)) | {"x": torch.zeros(2, 32)} | change
    with pytest.raises(ValueError, match=message):
        lut_linear(**settings)


def test_bad_rows_are_named():
    tables = torch.zeros(3, 16)
    codes = torch.zeros(3, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="d_in=7 is odd"):
        row_lut_linear(torch.zeros(1, 7), codes, tables)
    with pytest.raises(ValueError, match=r"packed is torch.uint8 of shape \(3, 4\).*\(3, 5\)"):
        row_lut_linear(torch.zeros(1, 10), codes, tables)
    with pytest.raises(ValueError, match=r"tables is torch.float32 of shape \(3, 8\).*\(3, 16\)"):
        row_lut_linear(torch.zeros(1, 8), codes, tables[:, :8])
    with pytest.raises(ValueError, match="x lies on cpu and tables on meta"):
        row_lut_linear(torch.zeros(1, 8), codes, tables.to("meta"))
    with pytest.raises(ValueError, match=r"x is torch.int64: cast it"):
        row_lut_linear(torch.zeros(1, 8).long(), codes, tables)
