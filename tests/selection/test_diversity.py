import itertools

import numpy as np
import pytest

from hf_efficiency.selection import select
from hf_efficiency.selection.d2_pruning import D2, nearest
from hf_efficiency.selection.dpp import greedy_map
from hf_efficiency.selection.embedding import HashedText, normalized
from hf_efficiency.selection.facility_location import facility_location, similarity
from hf_efficiency.selection.facility_location import greedy as greedy_choice
from hf_efficiency.selection.hybrid import choose_diverse, combined
from hf_efficiency.selection.kmeans import allocate, choose_from_clusters, kmeans


@pytest.fixture(scope="module")
def features():
    return normalized(np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32))


def coverage(sim, rows):
    return sim[:, rows].max(1).sum()


def test_facility_location_is_greedy(features):
    sim = similarity(features).astype(np.float64)
    chosen, gains = greedy_choice(sim.astype(np.float32), 8)
    greedy = []
    for _ in range(8):
        greedy.append(max(set(range(60)) - set(greedy), key=lambda j: coverage(sim, [*greedy, j])))
    assert chosen.tolist() == greedy
    assert gains.sum() == pytest.approx(coverage(sim, greedy), rel=1e-5)


def test_greedy_is_close_to_the_best():
    x = normalized(np.random.default_rng(1).normal(size=(10, 3)).astype(np.float32))
    sim = similarity(x)
    best = max(coverage(sim, list(rows)) for rows in itertools.combinations(range(10), 3))
    assert coverage(sim, facility_location(x, 3)[0]) >= (1 - 1 / np.e) * best


def test_facility_location_takes_all_and_prefers_quality(features):
    assert sorted(facility_location(features, 60)[0].tolist()) == list(range(60))
    quality = np.zeros(60)
    quality[7] = 100
    assert facility_location(features, 3, quality=quality)[0][0] == 7


def test_facility_location_in_parts(features):
    chosen, _ = facility_location(features, 6, part_rows=25)
    sim = similarity(features)
    assert len(set(chosen.tolist())) == 6
    assert coverage(sim, chosen) > 0.97 * coverage(sim, facility_location(features, 6)[0])
    assert len(set(facility_location(features, 40, part_rows=25)[0].tolist())) == 40


def test_greedy_map_maximises_the_determinant(features):
    quality = np.random.default_rng(2).uniform(0.9, 1.1, 60)
    kernel = (features @ features.T + 1e-3 * np.eye(60)) * quality[:, None] * quality
    chosen, gains = greedy_map(features, 4, quality=quality)
    greedy = []
    for _ in range(4):
        greedy.append(
            max(set(range(60)) - set(greedy), key=lambda j: np.linalg.det(kernel[np.ix_([*greedy, j], [*greedy, j])]))
        )
    assert chosen.tolist() == greedy
    assert gains.sum() == pytest.approx(np.linalg.slogdet(kernel[np.ix_(greedy, greedy)])[1], rel=1e-3)


def test_dpp_takes_quality_and_more_rows_than_features(features):
    quality = np.ones(60)
    quality[11] = 5
    assert greedy_map(features, 2, quality=quality)[0][0] == 11
    assert len(set(greedy_map(features, 60)[0].tolist())) == 60
    with pytest.raises(ValueError, match="quality must be positive"):
        greedy_map(features, 2, quality=np.zeros(60))


def test_allocation_by_hand():
    sizes = np.array([50, 30, 20])
    assert allocate(sizes, 10).tolist() == [5, 3, 2]
    assert allocate(sizes, 7).tolist() == [4, 2, 1]  # 3.5, 2.1, 1.4
    assert allocate(np.array([1, 50, 50]), 9, proportional=False).tolist() == [1, 4, 4]
    assert allocate(np.array([3, 1]), 4, proportional=False).tolist() == [3, 1]
    with pytest.raises(ValueError, match="k=9 is above the 4 rows"):
        allocate(np.array([3, 1]), 9)


def test_kmeans_finds_blobs_and_keeps_their_shares():
    centers = normalized(np.eye(3, 6, dtype=np.float32))
    points = np.repeat(centers, [40, 20, 20], axis=0) + 0.01
    labels, distances = kmeans(points.astype(np.float32), 3)
    chosen = choose_from_clusters(labels, distances, 8)
    assert [int((chosen < 40).sum()), int(((chosen >= 40) & (chosen < 60)).sum())] == [4, 2]
    with pytest.raises(ValueError, match="clusters=81 must lie between 1 and the 80 rows"):
        kmeans(points, 81)
    with pytest.raises(ValueError, match="within='middle' is unknown"):
        choose_from_clusters(labels, distances, 8, within="middle")


def test_nearest_and_farthest_of_a_cluster():
    labels, distances = np.zeros(4, np.int64), np.array([3.0, 1.0, 2.0, 0.0])
    assert choose_from_clusters(labels, distances, 2, within="nearest").tolist() == [1, 3]
    assert choose_from_clusters(labels, distances, 2, within="farthest").tolist() == [0, 2]


def test_d2_cuts_both_ends():
    losses = np.arange(10.0)
    chosen = D2(drop_easy=0.2, drop_hard=0.3, neighbors=0).choose(losses, 3, None)
    assert chosen.tolist() == [6, 5, 4]
    assert sorted(D2(drop_easy=0.2, drop_hard=0.3, neighbors=0).choose(losses, 9, None).tolist()) == list(range(9))


def test_d2_messages_by_hand():
    """Two twins and one loner: the first twin is chosen, and its twin loses to the loner, whose loss is lower."""
    features = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    losses = np.array([1.9, 2.0, 1.0])
    config = D2(drop_easy=0, drop_hard=0, neighbors=1, gamma_forward=0.0, gamma_reverse=0.0)
    # difficulties above the lowest: .9, 1, 0; the twins pass to each other 1.9, 1.9; the loner hears one of them
    assert config.choose(losses, 2, features)[1] != 1 - config.choose(losses, 2, features)[0]
    assert 2 in config.choose(losses, 2, features)
    plain = D2(drop_easy=0, drop_hard=0, neighbors=0).choose(losses, 2, None)
    assert plain.tolist() == [1, 0]


def test_nearest_neighbours(features):
    indices, distances = nearest(features, 3)
    full = ((features[:, None] - features[None]) ** 2).sum(-1)
    np.fill_diagonal(full, np.inf)
    np.testing.assert_allclose(np.sort(distances), np.sort(full)[:, :3], atol=1e-5)
    assert indices.shape == (60, 3)


def test_combined_ranks_and_relevance():
    scores = {"a": np.array([1.0, 2, 3]), "b": np.array([30.0, 20, 10])}
    np.testing.assert_allclose(combined(scores, {"a": 3, "b": 1}), [0.25, 0.5, 0.75])
    np.testing.assert_allclose(combined(scores, {"a": 1, "b": -1}), [-0.5, 0, 0.5])
    features = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    gains = np.array([1.0, 0.99, 0.5])
    assert choose_diverse(gains, 2, features, 0.5).tolist() == [0, 2]
    assert choose_diverse(gains, 2, features, 0.0).tolist() == [0, 1]
    with pytest.raises(ValueError, match="both must be the same"):
        combined(scores, {"a": 1})
    with pytest.raises(ValueError, match="all weights are zero"):
        combined(scores, {"a": 0, "b": 0})
    with pytest.raises(ValueError, match=r"diversity=1 must lie in \[0, 1\)"):
        choose_diverse(gains, 1, features, 1)


def test_hashed_text_is_near_for_like_texts():
    texts = ["the cat sat on the mat today", "the cat sat on the mat", "quantum field theory of gauge bosons", ""]
    config = HashedText(dim=256)
    x = config.embed(texts, config.weights([texts]))
    assert x[0] @ x[1] > 0.7 > 0.4 > abs(x[0] @ x[2])
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), [1, 1, 1, 0], rtol=1e-5)


@pytest.mark.parametrize("strategy", ["kmeans", "facility-location", "dpp", "hybrid"])
def test_select_takes_from_every_topic(strategy):
    topics = ["apples pears plums cherries", "engines pistons valves gears", "violins cellos harps flutes"]
    texts = [f"{topics[i % 3]} {i // 3}" for i in range(30)]
    settings = {"clusters": 3} if strategy == "kmeans" else {}
    chosen = select(texts, strategy, 3, **settings).indices
    assert {int(i) % 3 for i in chosen} == {0, 1, 2}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: D2(drop_easy=0.5, drop_hard=0.5), "together they must stay below 1"),
        (lambda: D2(neighbors=-1), "neighbors=-1 must not be negative"),
        (lambda: D2().choose(np.ones(3), 1, None), "needs features for its graph"),
        (lambda: HashedText(dim=0), "dim=0 must be at least 1"),
        (
            lambda: select(["a", "b"], "dpp", 1, features=np.ones((3, 2))),
            r"shape \(3, 2\); expected one row for each of 2",
        ),
        (lambda: select(["a"], "dpp", 1, features=np.full((1, 2), np.nan)), "features hold NaN"),
        (lambda: select(["a"], "dpp", 1, features="model"), "features='model' needs a model"),
        (lambda: select(["a"], "hybrid", 1, weights={"x": 1}), "weights name 'x': pass its values in scores="),
        (lambda: select(["a"], "hybrid", 1, weights={"x": 1}, scores={"x": [1, 2]}), "has 2 values for a pool of 1"),
        (lambda: select(["a"], "hybrid", 1, weights={"loss": 1}), "'loss' needs model=.* and tokenizer="),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
