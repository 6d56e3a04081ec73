"""The rotations of QuIP#: constructed matrices, transforms of any length, reproducible signs."""

import pytest
import torch

from hf_efficiency.quantization.hadamard import dense_base, hadamard_matrix, hadamard_transform, random_signs

# 576 and 1536: SmolLM2; 11008 = 64 * 172: Llama 2; 86 = 2 * 43, 7 and 1028 = 4 * 257 have no Hadamard base here.
LENGTHS = [1, 2, 7, 8, 24, 86, 88, 192, 576, 1028, 1536, 4096, 11008]


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 44, 48, 52, 60, 92, 100, 172, 344])
def test_matrix_is_hadamard(order):
    matrix = hadamard_matrix(order)
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


def test_every_multiple_of_four_up_to_112_is_constructed():
    assert all(hadamard_matrix(order) is not None for order in range(4, 113, 4))


@pytest.mark.parametrize("order", [3, 6, 86, 116])
def test_orders_without_a_construction(order):
    assert hadamard_matrix(order) is None


def test_matrix_of_order_zero():
    with pytest.raises(ValueError, match="order of at least 1, got 0"):
        hadamard_matrix(0)


def test_length_two_by_hand():
    x = torch.tensor([3.0, 1.0])
    torch.testing.assert_close(hadamard_transform(x), torch.tensor([4.0, 2.0]) / 2**0.5)


@pytest.mark.parametrize("n", [4, 24, 192, 576])
def test_transform_equals_the_matrix(n):
    matrix = hadamard_matrix(n) / n**0.5
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hadamard_transform(x), x @ matrix.T)
    torch.testing.assert_close(hadamard_transform(x, transpose=True), x @ matrix)


@pytest.mark.parametrize("n", [1, 7, 8, 86, 576])
@pytest.mark.parametrize("transpose", [False, True])
def test_any_dimension(n, transpose):
    x = torch.randn(2, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = hadamard_transform(x.mT, transpose).mT
    torch.testing.assert_close(hadamard_transform(x, transpose, dim=1), expected)
    torch.testing.assert_close(hadamard_transform(x, transpose, dim=-2), expected)


@pytest.mark.parametrize("n", LENGTHS)
def test_transform_is_orthogonal(n):
    x = torch.randn(2, 3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = hadamard_transform(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(hadamard_transform(y, transpose=True), x)


@pytest.mark.parametrize("n", LENGTHS[2:])
def test_an_outlier_is_spread_over_all_outputs(n):
    x = torch.zeros(n, dtype=torch.float64)
    x[n // 3] = 1.0
    assert hadamard_transform(x).abs().max() <= (2 / n) ** 0.5 + 1e-12


@pytest.mark.parametrize("n", [6, 24])
def test_gradient_is_the_transpose(n):
    x = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, n, dtype=torch.float64)
    (hadamard_transform(x) * weight).sum().backward()
    torch.testing.assert_close(x.grad, hadamard_transform(weight, transpose=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    x = torch.randn(4, 576, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(hadamard_transform(x), hadamard_transform(x.float()).to(dtype))


def test_rotation_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        hadamard_transform(torch.randn(40))
    x = torch.randn(40, requires_grad=True)
    hadamard_transform(x).sum().backward()
    assert x.grad is not None


def test_refuses_integers_and_scalars():
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        hadamard_transform(torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="non-empty dimension"):
        hadamard_transform(torch.tensor(1.0))


def test_signs_are_fixed_for_all_time():
    # A checkpoint stores the seed only, so these values are part of the format.
    expected = [float(c + "1") for c in "+-+-+++-++--+--+"]
    assert random_signs(5, "SU", 16).tolist() == expected
    assert random_signs(5, "SV", 16).tolist() != expected
    assert torch.equal(random_signs(5, "SU", 40)[:16], random_signs(5, "SU", 16))
    assert abs(random_signs(0, "SV", 4096).mean()) < 0.05


@pytest.mark.parametrize("n", LENGTHS)
def test_dense_base_makes_the_rotation(n):
    base = dense_base(n)
    if n in (7, 86, 1028):
        assert base is None
        return
    assert base.dtype == torch.int8
    assert (n // len(base)).bit_count() == 1
    x = torch.randn(2, n)
    y = x.view(2, -1, len(base)) @ base.T.float()
    sylvester = hadamard_matrix(n // len(base)).float()
    torch.testing.assert_close((sylvester @ y).view(2, n) / n**0.5, hadamard_transform(x), rtol=1e-4, atol=1e-4)
