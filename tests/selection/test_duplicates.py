import numpy as np
import pytest

from hf_efficiency.selection import optional, select
from hf_efficiency.selection.clusters import Clusters
from hf_efficiency.selection.exact import exact_clusters
from hf_efficiency.selection.hashing import shingles
from hf_efficiency.selection.minhash import MinHash, unique_per_document
from hf_efficiency.selection.simhash import SimHash
from hf_efficiency.selection.spool import Spool


def planted(n=120, words=60, seed=0):
    """n random texts and n copies with 0 to 20 % of the words replaced."""
    generator = np.random.default_rng(seed)
    originals = generator.integers(0, 3000, (n, words))
    copies = originals.copy()
    copies[generator.random((n, words)) < generator.uniform(0, 0.2, (n, 1))] += 5000
    return [" ".join(f"w{word}" for word in row) for row in (*originals, *copies)]


def jaccard_pairs(texts, ngram, threshold):
    sets = [set(shingles([text], ngram).hashes.tolist()) for text in texts]
    found = []
    for i, a in enumerate(sets):
        for j in range(i + 1, len(sets)):
            union = len(a | sets[j])
            if union and len(a & sets[j]) / union >= threshold:
                found.append((i, j))
    return found


@pytest.mark.parametrize("backend", ["numpy", "rensa"])
@pytest.mark.parametrize("ngram", [1, 3])
def test_minhash_finds_all_pairs_and_no_others(backend, ngram):
    texts = planted()
    expected = jaccard_pairs(texts, ngram, 0.7)
    config = MinHash(ngram=ngram, backend=backend)
    assert len(expected) > 20
    assert config.pairs(texts) == expected
    labels = config.clusters([texts[:50], texts[50:]]).labels()
    assert [(i, j) for i, j in enumerate(labels) if i != j] == [(j, i) for i, j in expected]


def test_signatures_estimate_the_similarity():
    """The share of equal entries is the Jaccard similarity, 50 / 150, to within four standard errors."""
    a, b = (" ".join(f"w{i}" for i in range(start, start + 100)) for start in (0, 50))
    config = MinHash(ngram=1, num_perm=1024)
    first, second = config.signatures(unique_per_document(shingles([a, b], 1)))
    share = (first == second).mean()
    assert share == pytest.approx(1 / 3, abs=4 * np.sqrt(1 / 3 * 2 / 3 / 1024))


def test_bands_are_chosen_for_recall():
    config = MinHash(threshold=0.7, num_perm=128)
    assert config.rows == 4  # 1 − (1 − .7⁴)³² = .9999; with rows of 5, 1 − (1 − .7⁵)²⁵ = .990
    assert 1 - (1 - 0.7**5) ** 25 < 0.995


def test_large_groups_are_joined():
    """More equal texts than are compared pair by pair, and one that shares only half with them."""
    same = ["a b c d e f g h i j"] * 50
    labels = MinHash(ngram=1, threshold=0.5).clusters([[*same, "z y x w v u t s r q", "", ""]]).labels()
    assert labels.tolist() == [0] * 50 + [50, 51, 52]


def test_spool_counts_what_is_shared():
    with Spool() as spool:
        grams = unique_per_document(shingles(["a b c d", "c d e", "", "a b c d a"], 1))
        spool.add(grams, np.zeros((1, 4), np.uint32))
        found = spool.jaccard(np.array([0, 0, 0]), np.array([1, 2, 3]))
    np.testing.assert_allclose(found, [2 / 5, 0, 1])


def test_simhash_by_majority():
    """Three equal features and one other: every bit is the majority's."""
    once = SimHash(ngram=1).fingerprints(["cat", "dog", "cat cat cat dog", ""])
    assert once[2] == once[0]
    assert once[3] == 0


def test_simhash_finds_close_texts_and_leaves_empty_ones():
    base = " ".join(f"w{i}" for i in range(400))
    texts = [base, base + " extra", " ".join(f"v{i}" for i in range(400)), "", " "]
    config = SimHash(ngram=1, max_distance=8)
    distance = int(np.bitwise_count(np.bitwise_xor(*config.fingerprints(texts[:2]))))
    assert distance <= 8
    assert config.clusters([texts[:2], texts[2:]]).labels().tolist() == [0, 0, 2, 3, 4]


@pytest.mark.parametrize("distance", [0, 3, 7])
def test_simhash_search_is_complete(distance):
    generator = np.random.default_rng(1)
    prints = generator.integers(0, 1 << 63, 60, dtype=np.uint64)
    prints[30:] = prints[:30] ^ np.array([sum(1 << int(b) for b in generator.choice(64, i % 10, replace=False))
                                          for i in range(30)], np.uint64)  # fmt: skip
    config = SimHash(max_distance=distance)
    expected = Clusters(60)
    for i in range(60):
        for j in range(i):
            if np.bitwise_count(prints[i] ^ prints[j]) <= distance:
                expected.join(i, j)
    found = config.joined(prints, np.arange(60))
    assert found.labels().tolist() == expected.labels().tolist()


def test_exact_ignores_case_and_spaces():
    texts = ["A  b\n", "a b", "a c", "a b"]
    assert exact_clusters([texts[:2], texts[2:]]).labels().tolist() == [0, 0, 2, 0]
    assert exact_clusters([texts], normalize=False).labels().tolist() == [0, 1, 2, 1]


def test_clusters_are_named_by_their_smallest():
    clusters = Clusters(6)
    for pair in ((5, 3), (3, 4), (1, 4)):
        clusters.join(*pair)
    assert clusters.labels().tolist() == [0, 1, 2, 1, 1, 1]
    assert clusters.sizes().tolist() == [1, 4, 1, 4, 4, 4]


@pytest.mark.parametrize("strategy", ["exact", "minhash", "simhash"])
def test_select_keeps_one_of_each(strategy):
    texts = ["one two three four five six", "seven eight nine ten eleven twelve"] * 3
    selection = select(texts, strategy)
    assert selection.indices.tolist() == [0, 1]
    assert selection.report["duplicates"] == 4
    assert selection.report["largest_cluster"] == 3
    with pytest.raises(ValueError, match="k=3 is above the 2 rows that are left without duplicates"):
        select(texts, strategy, 3)


def test_missing_rensa_names_the_extra(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(optional.importlib, "import_module", missing)
    with pytest.raises(
        ImportError, match=r"needs 'rensa', which is not installed: pip install 'hf_efficiency\[data\]'"
    ):
        select(["a b c d e f"], "minhash", backend="rensa")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinHash(threshold=0), r"threshold=0 is a Jaccard similarity and must lie in \(0, 1\]"),
        (lambda: MinHash(ngram=0), "ngram=0 must be at least 1"),
        (lambda: MinHash(backend="x"), "backend='x' is unknown: use 'numpy' or 'rensa'"),
        (lambda: SimHash(max_distance=16), "max_distance=16 must lie between 0 and 15"),
        (lambda: SimHash(ngram=0), "ngram=0 must be at least 1"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
