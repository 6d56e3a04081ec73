"""AWQ: the search against the paper's definition, ranges by hand, the choice of layout, and whole tiny models.

Shape legend: n tokens, d_out, d_in features.
"""

import copy

import pytest
import torch

from hf_efficiency.calibration import run_blockwise
from hf_efficiency.quantization.affine import AffineGrid
from hf_efficiency.quantization.awq import AWQ, fit_clipped, search_scale
from hf_efficiency.quantization.folding import Fold
from hf_efficiency.quantization.rtn import RTN
from tests import tiny


def plain(channels):
    """A fold whose producer makes every channel for one reader."""
    return Fold(("b",), "a", channels, torch.arange(channels))


def decode(grid, weight, fitted):
    stored = grid.quantize(weight, *fitted)
    index = stored.g_idx.long()
    return (stored.codes.float() - stored.zeros.float()[:, index]) * stored.scales[:, index]


def outliers(n=256, d=32, seed=0):
    """Activations (n, d), four of whose channels are 20 times larger, correlated."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) @ (torch.eye(d) + 0.1 * torch.randn(d, d, generator=generator))
    x[:, ::8] *= 20
    return x


def test_search_is_the_papers_argmin():
    """Equation 4: s = x^alpha with the alpha that minimizes || Q(W diag(s)) diag(s)^-1 X - W X ||, run on X itself."""
    x = outliers()
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    grid = AffineGrid(3, 16)
    covariance = x.T @ x / len(x)
    errors = {}
    for i in range(20):
        s = covariance.diagonal().sqrt() ** (i / 20)
        errors[i] = ((x @ (decode(grid, weight * s, grid.fit(weight * s)) / s - weight).T) ** 2).sum().item()
    best = min(errors, key=errors.get)
    assert 0 < best < 20
    assert errors[best] < 0.5 * errors[0]
    found = search_scale([weight], [grid], covariance, plain(32), n_grid=20, duo_scaling=False)
    expected = covariance.diagonal().sqrt() ** (best / 20)
    torch.testing.assert_close(found / found.norm(), expected / expected.norm(), rtol=1e-4, atol=0)


def test_scale_is_centred_and_weighs_both_ends_alike():
    found = search_scale([torch.randn(8, 32)], [AffineGrid(4, 16)], outliers().T @ outliers() / 256, plain(32))
    torch.testing.assert_close(found.max() * found.min(), torch.tensor(1.0))


def test_duo_scaling_never_does_worse():
    x = outliers(seed=3)
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(4)) * torch.logspace(-1, 1, 32)
    grid = AffineGrid(4, 16)
    covariance = x.T @ x / len(x)

    def error(duo):
        s = search_scale([weight], [grid], covariance, plain(32), duo_scaling=duo)
        return ((x @ (decode(grid, weight * s, grid.fit(weight * s)) / s - weight).T) ** 2).sum()

    assert error(True) < error(False)


def test_shared_and_unseen_channels():
    """Inputs that one value head makes share a scale; queries and keys of a fused projection keep 1."""
    index = torch.cat([torch.arange(16, 24)] * 2 + [torch.arange(24, 32)] * 2)
    x = outliers()
    found = search_scale([torch.randn(8, 32)], [AffineGrid(3, 16)], x.T @ x / 256, Fold(("b",), "a", 32, index))
    assert found.shape == (32,)
    assert (found[:16] == 1).all()
    assert (found[16:] != 1).all()


def test_a_silent_channel_keeps_a_finite_scale():
    x = outliers()
    x[:, 3] = 0
    found = search_scale([torch.randn(8, 32)], [AffineGrid(4, 16)], x.T @ x / 256, plain(32))
    assert torch.isfinite(found).all()
    assert found[3] > 1e-4


def test_clipping_by_hand():
    """2 bits with a zero point of 1 hold -1, 0, 1 and 2 times the scale. The full range -1 .. 2.6 has scale 1.2, which
    misses -1, 1 and 2 by 0.2 and 0.4. Where the last channel hardly fires, a scale near 1 keeps the other four."""
    weight = torch.tensor([[-1.0, 0.0, 1.0, 2.0, 2.6]])
    energy = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-4])
    grid = AffineGrid(2, -1)
    full = decode(grid, weight, grid.fit(weight))
    torch.testing.assert_close(full, torch.tensor([[-1.2, 0.0, 1.2, 2.4, 2.4]]), rtol=0.01, atol=0)
    clipped = decode(grid, weight, fit_clipped(weight, torch.diag(energy), grid))
    torch.testing.assert_close(clipped[:, :4], weight[:, :4], rtol=0.03, atol=0)


def test_clipping_sees_correlations():
    """Channels that fire against each other: equal errors cancel, so the error to avoid is their difference."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 16, generator=generator)
    x = torch.randn(512, 8, generator=generator)
    x = torch.cat([x, 0.05 * torch.randn(512, 8, generator=generator) - x], dim=1)
    covariance = x.T @ x / 512
    grid = AffineGrid(3, 16)

    def error(fitted):
        return ((x @ (decode(grid, weight, fitted) - weight).T) ** 2).sum()

    full, diagonal = error(grid.fit(weight)), error(fit_clipped(weight, torch.diag(covariance.diagonal()), grid))
    matched = error(fit_clipped(weight, covariance, grid))
    assert matched < 0.9 * diagonal
    assert matched < 0.7 * full


@pytest.mark.parametrize("sym", [False, True])
def test_clipping_of_a_ragged_last_group_and_wide_groups(sym):
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    scales, zeros = fit_clipped(weight, torch.eye(40), AffineGrid(4, 16, sym))
    assert scales.shape == zeros.shape == (8, 3)
    assert (zeros == 8).all() or not sym
    wide = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    grid = AffineGrid(2, -1, sym)
    fitted = fit_clipped(wide, torch.eye(300), grid)
    assert (decode(grid, wide, fitted) - wide).norm() < (decode(grid, wide, grid.fit(wide)) - wide).norm()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "awq"),
        ({"bits": 3}, "gptq"),
        ({"bits": 8}, "gptq"),
        ({"format": "gptq_v2"}, "gptq_v2"),
        ({"bits": 4, "format": "gptq"}, "gptq"),
        ({"dynamic": {".*v_proj": {"bits": 8}}}, "gptq"),
        ({"dynamic": {"-:.*v_proj": {}}}, "awq"),
    ],
)
def test_layout_that_auto_means(settings, expected):
    assert AWQ(**settings).format == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"bits": 3, "format": "awq"}, "awq format holds 4-bit codes only, got bits=3"),
        ({"group_size": 0}, "group_size=0 must be a positive integer"),
        ({"format": "gguf"}, "format='gguf' is unknown"),
        ({"n_grid": 0}, "n_grid=0 must be a whole number of at least 1"),
        ({"dynamic": {".*": {"bits": 7}}}, "bits=7"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        AWQ(**settings)


def spiky_llama():
    """A tiny Llama whose norms amplify a few channels, as those of trained models do."""
    model = tiny.build_llama()
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data[::16] *= 10
    return model


def tokens():
    return torch.randint(3, 256, (8, 32), generator=torch.Generator().manual_seed(5))


def error_of(method, model, **kwargs):
    """Mean squared error of the logits on other tokens, and the compressed layers."""
    held_out = torch.randint(3, 256, (4, 32), generator=torch.Generator().manual_seed(6))
    compressed = copy.deepcopy(model)
    layers = run_blockwise(compressed, tokens(), method, progress=False, **kwargs)
    return (compressed(held_out).logits - model(held_out).logits).square().mean().item(), layers


@torch.no_grad()
def test_model_is_better_than_plain_rounding():
    model = spiky_llama()
    plain_error, _ = error_of(RTN(bits=3, group_size=32), model)
    scaled_error, _ = error_of(AWQ(bits=3, group_size=32, clip=False), model)
    full_error, layers = error_of(AWQ(bits=3, group_size=32), model)
    assert scaled_error < 0.7 * plain_error
    assert full_error < scaled_error
    assert len(layers) == 14


@torch.no_grad()
def test_folding_alone_changes_nothing():
    """At 8 bits rounding hardly shows, so the logits would show a scale that is not undone."""
    model = spiky_llama()
    error, layers = error_of(AWQ(bits=8, group_size=32), model)
    assert error < 1e-3 * model(tokens()).logits.var()
    weight = model.model.layers[0].mlp.down_proj.weight
    assert not torch.allclose(layers["model.layers.0.mlp.down_proj"].dequantize(), weight, rtol=0.1)


@torch.no_grad()
def test_layers_that_stay_dense_are_scaled_along():
    """A skipped value projection reads the same norm: it takes the scale up, and the outputs stay right."""
    model = spiky_llama()
    skip = [f"model.layers.{i}.self_attn.v_proj" for i in range(2)] + ["model.layers.1.mlp.down_proj"]
    error, layers = error_of(AWQ(bits=8, group_size=32), model, skip=skip)
    assert error < 1e-3 * model(tokens()).logits.var()
    assert not set(skip) & set(layers)


@torch.no_grad()
def test_overrides_reach_the_layers():
    _, layers = error_of(AWQ(group_size=32, dynamic={r".*v_proj": {"bits": 8, "group_size": 16}}), spiky_llama())
    value, query = layers["model.layers.0.self_attn.v_proj"], layers["model.layers.0.self_attn.q_proj"]
    assert (value.bits, value.group_size, value.layout) == (8, 16, "gptq")
    assert (query.bits, query.group_size, query.layout) == (4, 32, "gptq")


@torch.no_grad()
def test_layout_falls_back_before_anything_is_stored():
    """Only the down projection's 160 inputs are no multiple of 64; the whole model goes to the gptq layout."""
    _, layers = error_of(AWQ(group_size=64), tiny.build_llama())
    assert {layer.layout for layer in layers.values()} == {"gptq"}
    _, layers = error_of(AWQ(group_size=32), tiny.build_llama())
    assert {layer.layout for layer in layers.values()} == {"awq"}
    with pytest.raises(ValueError, match=r"down_proj: the awq format has no ragged last group: in_features=160"):
        error_of(AWQ(group_size=64, format="awq"), tiny.build_llama())


@torch.no_grad()
def test_interrupted_run_ends_the_same(tmp_path):
    """A block restored from disk brings its scaled norms along."""
    once, twice = spiky_llama(), spiky_llama()
    run_blockwise(once, tokens(), AWQ(group_size=32), progress=False, resume_dir=tmp_path)
    (tmp_path / "block-00001.safetensors").unlink()
    run_blockwise(twice, tokens(), AWQ(group_size=32), progress=False, resume_dir=tmp_path)
    torch.testing.assert_close(once(tokens()).logits, twice(tokens()).logits, rtol=0, atol=0)


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
def test_damaged_weights_are_named(damage):
    model = tiny.build_llama()
    model.model.layers[0].self_attn.k_proj.weight.data[0, 0] = damage
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.k_proj"):
        run_blockwise(model, tokens(), AWQ(group_size=32), progress=False)


@pytest.mark.slow
@torch.no_grad()
def test_real_blocks_are_better_than_plain_rounding(smollm2, texts):
    """First two blocks of SmolLM2-135M at 4 bits: AWQ leaves less than 70 % of RTN's squared error on other text."""
    dense, tokenizer = smollm2
    ids = tokenizer(" ".join(texts), return_tensors="pt").input_ids[0]
    calibration, held_out = ids[: 4 * 256].view(4, 256), ids[-2 * 256 :].view(2, 256)
    config = copy.deepcopy(dense.config)
    config.num_hidden_layers = 2
    small = type(dense)(config).eval()
    small.load_state_dict({k: v for k, v in dense.state_dict().items() if k in small.state_dict()})
    expected = small.model(held_out).last_hidden_state
    errors = {}
    for method in (RTN(bits=4, group_size=64), AWQ(bits=4, group_size=64)):
        model = copy.deepcopy(small)
        run_blockwise(model, calibration, method, progress=False)
        # The first token's massive activations would hide all others.
        errors[type(method)] = (model.model(held_out).last_hidden_state - expected)[:, 1:].square().mean()
    assert errors[AWQ] < 0.7 * errors[RTN], errors
