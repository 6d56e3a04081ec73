"""Block LDLQ: the factorization, the feedback and the sweeps, against their algebra."""

import pytest
import torch

from hf_efficiency.quantization.e8p import CODEBOOKS
from hf_efficiency.quantization.ldlq import block_ldl, damped_cholesky, ldlq, proxy_loss, sweep


def hessian_of(n, seed=0, tokens=400):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator) / n**0.5 + 0.5 * torch.eye(n)
    x = torch.randn(tokens, n, generator=generator) @ mix
    return x.T @ x / tokens


def round_to_integers(x):
    return [torch.zeros(len(x), dtype=torch.uint8)], x.round()


def test_block_ldl_rebuilds_the_hessian():
    hessian = hessian_of(40).double()
    lower = block_ldl(torch.linalg.cholesky(hessian))
    blocks = lower.view(5, 8, 5, 8)
    for i in range(5):
        assert torch.allclose(blocks[i, :, i], torch.eye(8, dtype=torch.float64))
        assert all(blocks[i, :, j].abs().max() == 0 for j in range(i + 1, 5))
    inverse = torch.linalg.inv(lower)
    diagonal = inverse @ hessian @ inverse.T
    off = diagonal.view(5, 8, 5, 8).clone()
    for i in range(5):
        off[i, :, i] = 0
    assert off.abs().max() < 1e-10


@pytest.mark.parametrize("n", [8, 136, 264])  # below, above and no multiple of the lazy panel
def test_feedback_leaves_only_the_rounding_error(n):
    hessian = hessian_of(n, tokens=4 * n).double()
    lower = block_ldl(torch.linalg.cholesky(hessian))
    weight = 3 * torch.randn(5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    codes, quantized = ldlq(weight, lower, round_to_integers)
    assert codes[0].shape == (5, n // 8)
    assert ((weight - quantized) @ lower).abs().max() <= 0.5 + 1e-9
    assert torch.allclose(quantized, quantized.round())


def test_identity_hessian_is_plain_rounding():
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    codebook = CODEBOOKS[2]
    codes, quantized = ldlq(weight, torch.eye(16), codebook.quantize)
    nearest, value = codebook.quantize(weight.view(-1, 8))
    assert torch.equal(codes[0].view(-1), nearest[0])
    torch.testing.assert_close(quantized, value.view(6, 16))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ldlq_beats_nearest_and_sweeps_beat_ldlq(bits):
    codebook, hessian = CODEBOOKS[bits], hessian_of(136)
    weight = torch.randn(64, 136, generator=torch.Generator().manual_seed(3))
    lower = block_ldl(torch.linalg.cholesky(hessian))
    codes, quantized = ldlq(weight, lower, codebook.quantize)
    losses = [proxy_loss(weight - quantized, hessian).item()]
    for _ in range(2):
        sweep(weight, codes, quantized, hessian, codebook.quantize)
        losses.append(proxy_loss(weight - quantized, hessian).item())
    nearest = codebook.quantize(weight.view(-1, 8))[1].view_as(weight)
    assert losses[0] < 0.9 * proxy_loss(weight - nearest, hessian).item()
    assert losses[1] < losses[0]
    assert losses[2] <= losses[1]
    torch.testing.assert_close(codebook.decode(codes), quantized)


def test_damping_grows_until_positive_definite():
    rank_one = torch.ones(16, 16)
    rank_one[0, 0] = 0.5  # indefinite: no small damping helps
    factor, damped = damped_cholesky(rank_one, 1e-4, "layer")
    torch.testing.assert_close(factor @ factor.T, damped)
    assert damped[1, 1] > 1.01


def test_hopeless_hessian_names_the_layer():
    with pytest.raises(ValueError, match=r"model\.layers\.0\.q: the Hessian is not positive definite even with"):
        damped_cholesky(-torch.eye(8), 0.01, "model.layers.0.q")


def test_nan_names_the_layer():
    with pytest.raises(ValueError, match="q_proj: the Hessian holds NaN"):
        damped_cholesky(torch.full((8, 8), torch.nan), 0.01, "q_proj")
