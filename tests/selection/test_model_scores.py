import copy

import numpy as np
import pytest
import torch

from hf_efficiency.selection import select
from hf_efficiency.selection.el2n import classifier_el2n, el2n, grand
from hf_efficiency.selection.influence import (
    GradientFeatures,
    direction,
    directions,
    influence,
    parts_of,
    target_features,
)
from hf_efficiency.selection.perplexity import choose_band, choose_median, perplexity
from hf_efficiency.selection.signals import example_signal, scoring, signals, to_batch
from hf_efficiency.selection.uncertainty import bald, entropy, variation_ratio
from tests.families import FAMILIES, build_family
from tests.tiny import build_llama


@pytest.fixture
def batch():
    ids = torch.randint(3, 250, (3, 10), generator=torch.Generator().manual_seed(0))
    return to_batch([ids[0].tolist(), ids[1, :6].tolist(), ids[2, :2].tolist()], "cpu")


def alone(batch, i):
    """Row i without padding."""
    length = int(batch["attention_mask"][i].sum())
    return {name: tensor[i : i + 1, :length] for name, tensor in batch.items()}


def test_signals_by_hand():
    """p = (1/2, 1/4, 1/4), label 1."""
    found = signals(torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([1]))
    assert float(found["loss"]) == pytest.approx(np.log(4))
    assert float(found["el2n"]) == pytest.approx(np.sqrt(0.25 + 0.5625 + 0.0625))
    assert float(found["entropy"]) == pytest.approx(1.5 * np.log(2))
    assert float(found["confidence"]) == pytest.approx(0.5)
    logits, labels = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([1])
    assert float(classifier_el2n(logits, labels)) == pytest.approx(float(found["el2n"]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "bloom"])
def test_padding_and_neighbours_change_nothing(family, batch):
    model = build_family(family)
    for score in (perplexity, el2n, grand, entropy, variation_ratio):
        with scoring(model):
            together = score(model, batch)
            one_by_one = torch.cat([score(model, alone(batch, i)) for i in range(3)])
        torch.testing.assert_close(together, one_by_one, rtol=2e-4, atol=1e-5)


def test_perplexity_is_that_of_the_models_loss(tiny_llama, batch):
    with torch.no_grad():
        expected = [float(tiny_llama(**alone(batch, i)).loss.exp()) for i in range(3)]
        assert perplexity(tiny_llama, batch).tolist() == pytest.approx(expected, rel=1e-4)


def test_labels_are_respected(tiny_llama, batch):
    batch["labels"][0, :5] = -100
    with torch.no_grad():
        expected = float(tiny_llama(**alone(batch, 0)).loss)
        assert float(example_signal(tiny_llama, batch, "loss")[0]) == pytest.approx(expected, rel=1e-4)
        batch["labels"][1] = -100
        assert float(example_signal(tiny_llama, batch, "loss")[1]) == -np.inf


def test_grand_is_the_norm_of_the_heads_gradient(tiny_llama, batch):
    for i in range(3):
        tiny_llama.zero_grad()
        tiny_llama(**alone(batch, i)).loss.backward()
        expected = float(tiny_llama.lm_head.weight.grad.norm())
        with torch.no_grad():
            assert float(grand(tiny_llama, batch)[i]) == pytest.approx(expected, rel=1e-3)


def test_scoring_gives_the_modes_back(tiny_llama):
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()
    with scoring(tiny_llama):
        assert not tiny_llama.training
        assert not torch.is_grad_enabled()
    assert tiny_llama.training
    assert not tiny_llama.model.layers[0].training


def test_bald_is_zero_without_doubt_and_not_with_it(batch):
    model = build_llama()
    with scoring(model):
        with pytest.raises(ValueError, match=r"no dropout layer with a rate above 0: set dropout=0.1"):
            bald(model, batch)
        with pytest.raises(ValueError, match="passes=1 must be at least 2"):
            bald(model, batch, passes=1)
        with pytest.raises(ValueError, match=r"dropout=1.0 must lie between 0 and 1"):
            bald(model, batch, dropout=1.0)
        state = torch.get_rng_state()
        small, large = bald(model, batch, dropout=1e-6), bald(model, batch, dropout=0.3)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(large, bald(model, batch, dropout=0.3))
    assert (small < 1e-3).all()
    assert (large > 10 * small).all()


def test_bald_by_hand(monkeypatch):
    """Two passes that are sure of different tokens: the mean has an entropy of ln 2, each pass of none."""
    from hf_efficiency.selection import uncertainty

    passes = iter([torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])])
    monkeypatch.setattr(uncertainty, "token_logits", lambda model, batch: next(passes))
    model = torch.nn.Sequential(torch.nn.Dropout(0.5)).eval()
    found = bald(model, {"input_ids": torch.tensor([[1, 2]])}, passes=2)
    assert float(found) == pytest.approx(np.log(2))


def test_bald_with_the_models_own_dropout(batch):
    model = build_family("gpt2", embd_pdrop=0.2, resid_pdrop=0.2)
    with scoring(model):
        assert (bald(model, batch, passes=4) > 0).all()
        assert all(not module.training for module in model.modules())


def projected(model, name, batch, rank):
    """Projected gradient of one layer, by the definition: the full gradient between two matrices."""
    gradients = GradientFeatures(rank=rank, max_layers=100)
    layer = dict(model.named_modules())[name]
    model.zero_grad()
    model(**batch).loss.backward()
    a, b = gradients._matrix(name, "in", layer.in_features), gradients._matrix(name, "out", layer.out_features)
    return (b.T @ layer.weight.grad @ a).flatten()


def test_gradient_features_are_projected_gradients(tiny_llama, batch):
    gradients = GradientFeatures(rank=4, max_layers=100)
    found = gradients(tiny_llama, batch)
    names = list(gradients.layers(tiny_llama))
    assert found.shape == (3, 14, 16)
    for name in (names[0], names[-1]):
        for i in range(3):
            expected = projected(tiny_llama, name, alone(batch, i), 4)
            torch.testing.assert_close(found[i, names.index(name)], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gradient_features_of_every_family(family, batch):
    model = build_family(family).requires_grad_(False)
    features = GradientFeatures(rank=4, max_layers=6)(model, batch)
    assert features.shape[0] == 3
    assert torch.isfinite(features).all()
    assert (features.flatten(1).norm(dim=1) > 0).all()


def test_lora_layers_alone_are_used(tiny_llama, batch):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    gradients = GradientFeatures(rank=4)
    assert len(gradients.layers(model)) == 8
    assert all(".lora_" in name for name in gradients.layers(model))
    assert (gradients(model, batch).flatten(1).norm(dim=1) > 0).all()


def test_directions_by_hand():
    """One layer of two features; two gradients of the pool, one of the target."""
    pool, target = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]), torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(direction("less", target, pool), target)
    # (XᵀX / 2 + λ I)⁻¹ v with XᵀX / 2 = diag(.5, 2) and λ = .1 · mean(1, 4) / 2
    lam = 0.1 * 2.5 / 2
    expected = torch.tensor([[3 / (0.5 + lam), 4 / (2 + lam)]])
    torch.testing.assert_close(direction("trak", target, pool), expected, rtol=1e-4, atol=1e-5)
    # (1/2) Σ_i (g_i g_iᵀ + λ I)⁻¹ v with λ = .1 · 2.5 / 2
    inverses = torch.stack([torch.linalg.inv(g[0, :, None] * g[0] + lam * torch.eye(2)) for g in pool])
    expected = (inverses.mean(0) @ target[0])[None]
    torch.testing.assert_close(direction("datainf", target, pool), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="method='x' is unknown: use 'less', 'trak' or 'datainf'"):
        direction("x", target, pool)
    with pytest.raises(ValueError, match="a gradient of the pool is NaN"):
        directions("less", target[None], pool * float("nan"))


def test_an_example_counts_by_the_part_that_it_helps_most():
    target = torch.tensor([[[2.0, 0.0]], [[0.0, 5.0]]])
    along = directions("less", target, target)
    found = influence(torch.tensor([[[3.0, 4.0]], [[-1.0, 0.0]], [[0.0, 0.0]]]), along)
    torch.testing.assert_close(found, torch.tensor([0.8, 0.0, 0.0]))


def test_many_target_examples_are_joined_to_parts():
    angles = torch.cat([torch.linspace(-0.1, 0.1, 9), torch.linspace(1.4, 1.6, 9)])
    features = torch.stack([angles.cos(), angles.sin()], 1)[:, None]
    parts = parts_of(features, 2)
    assert sorted(torch.atan2(parts[:, 0, 1], parts[:, 0, 0]).tolist()) == pytest.approx([0.0, 1.5], abs=1e-3)


@pytest.mark.parametrize("method", ["less", "trak", "datainf"])
def test_influence_predicts_what_a_step_does(tiny_llama, method):
    """Examples like the target's, whose steps lower its loss the most, have the highest influence."""
    generator = torch.Generator().manual_seed(2)
    pool = torch.randint(3, 250, (12, 8), generator=generator)
    target = to_batch(torch.randint(3, 250, (2, 8), generator=generator).tolist(), "cpu")
    pool[:4] = target["input_ids"][0]
    pool[:4, 1] = torch.randint(3, 250, (4,), generator=generator)
    gradients = GradientFeatures(rank=8)
    features = torch.cat([gradients(tiny_llama, to_batch([row], "cpu")) for row in pool.tolist()])
    others = to_batch(torch.randint(3, 250, (12, 8), generator=generator).tolist(), "cpu")
    sample = gradients(
        tiny_llama, others
    )  # the curvature; from the pool it would hide a direction that four rows share
    scores = influence(features, directions(method, target_features(gradients, tiny_llama, [target]), sample))
    gains = []
    with torch.no_grad():
        before = float(tiny_llama(**target).loss)
    for row in pool.tolist():
        model = copy.deepcopy(tiny_llama)
        model(**to_batch([row], "cpu")).loss.backward()
        length = sum(float((p.grad**2).sum()) for p in model.parameters()) ** 0.5
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-3 * parameter.grad / length
            gains.append(before - float(model(**target).loss))
    assert set(scores.topk(4).indices.tolist()) == {0, 1, 2, 3}
    assert set(np.argsort(gains)[-4:]) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientFeatures(rank=0), "rank=0 must be at least 1"),
        (lambda: GradientFeatures(max_layers=0), "max_layers=0 must be at least 1"),
        (lambda: GradientFeatures().layers(torch.nn.Dropout()), "has no linear layer"),
        (lambda: grand(torch.nn.Linear(1, 1), {"input_ids": torch.ones(1, 2)}), "has no output head"),
        (lambda: example_signal(torch.nn.Linear(1, 1), {"x": 1}, "loss"), r"entries \['x'\]; input_ids or labels"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_band_and_median():
    scores = np.array([1.0, 2, 4, 8, 16, np.inf])
    assert set(choose_band(scores, 2, 0.2, 0.8, 0)) <= {1, 2, 3}
    assert choose_band(scores, 5, 0.2, 0.8, 0).tolist() == [0, 1, 2, 3, 4]
    assert choose_band(scores, 3, 0.4, 0.6, 0).tolist() == [1, 2, 3]
    assert choose_median(scores, 1).tolist() == [2]
    assert set(choose_median(scores, 3)) == {1, 2, 3}
    with pytest.raises(ValueError, match="k=6 is above the 5 rows of the pool that have a perplexity"):
        choose_band(scores, 6, 0.2, 0.8, 0)


@pytest.fixture(scope="module")
def trained(texts, tiny_tokenizer):
    """A tiny model that has seen some prose."""
    model = build_llama(vocab_size=len(tiny_tokenizer), initializer_range=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids = tiny_tokenizer(texts[:32], truncation=True, max_length=64)["input_ids"]
    with torch.enable_grad():
        for step in range(60):
            batch = to_batch([ids[(8 * step + i) % 32] for i in range(8)], "cpu")
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def test_a_perplexity_band_throws_out_garbage_and_repetition(trained, texts, tiny_tokenizer):
    generator = np.random.default_rng(0)
    garbage = ["".join(chr(c) for c in generator.integers(33, 126, 120)) for _ in range(4)]
    repetition = [text[:24] * 12 for text in texts[:4]]
    # the paragraphs left out stand there twice
    prose = [*texts[32:41], *texts[47:60]]
    pool = [*prose, *garbage, *repetition]
    for settings in ({"low": 0.15, "high": 0.85}, {"nearest": "median"}):
        selection = select(pool, "perplexity", 20, model=trained, tokenizer=tiny_tokenizer, max_length=64, **settings)
        assert set(selection.indices) <= set(range(22)), settings
    assert selection.scores[22:26].min() > selection.scores[:22].max()
    assert selection.scores[26:].max() < selection.scores[:22].min()


def test_uncertainty_prefers_what_was_not_seen(trained, texts, tiny_tokenizer):
    pool = [*texts[:10], *[text.swapcase()[::-1] for text in texts[:10]]]
    for strategy, settings in (("entropy", {}), ("variation-ratio", {}), ("bald", {"dropout": 0.2})):
        arguments = {"model": trained, "tokenizer": tiny_tokenizer, "max_length": 48, **settings}
        chosen = select(pool, strategy, 10, **arguments).indices
        assert (chosen >= 10).mean() > 0.6, strategy


def test_several_models_are_averaged(trained, texts, tiny_tokenizer):
    other = build_llama(seed=5, vocab_size=len(tiny_tokenizer))
    both, first, second = (
        select(texts[:5], "el2n", 3, model=model, tokenizer=tiny_tokenizer, max_length=32).scores
        for model in ([trained, other], trained, other)
    )
    np.testing.assert_allclose(both, (first + second) / 2, rtol=1e-5)


def test_select_influence_finds_the_targets_kind(trained, texts, tiny_tokenizer):
    code = [f"x{i} = [f(y) for y in z{i}]; return x{i} + {i}" for i in range(12)]
    pool = [*texts[:12], *code[:6]]
    for method in ("less", "trak", "datainf"):
        settings = {"model": trained, "tokenizer": tiny_tokenizer, "max_length": 48, "method": method}
        chosen = select(pool, "influence", 6, target=code[6:], **settings).indices
        assert len(set(chosen) & set(range(12, 18))) >= 5, method


def test_empty_texts_are_never_chosen(trained, texts, tiny_tokenizer):
    pool = ["", *texts[:4]]
    selection = select(pool, "entropy", 4, model=trained, tokenizer=tiny_tokenizer, max_length=32)
    assert 0 not in selection.indices
    assert selection.report["unscored"] == 1
    with pytest.raises(ValueError, match="k=5 is above the 4 rows that may be chosen"):
        select(pool, "entropy", 5, model=trained, tokenizer=tiny_tokenizer, max_length=32)


def test_features_of_a_model(trained, texts, tiny_tokenizer):
    pool = [*texts[:6], *["zq xv " * 20] * 6]
    arguments = {"model": trained, "tokenizer": tiny_tokenizer, "max_length": 32}
    chosen = select(pool, "facility-location", 2, features="model", **arguments).indices
    assert {int(i) >= 6 for i in chosen} == {True, False}
