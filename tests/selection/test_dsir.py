import math

import numpy as np
import pytest

from hf_efficiency.selection import select
from hf_efficiency.selection.dsir import DSIR


def test_scores_by_hand():
    """Two words in buckets of their own: counts and smoothing give the mean log-ratio."""
    config = DSIR(max_n=1, buckets=1 << 20, share=1.0)
    target, pool = config.count([["cat cat cat dog"]]), config.count([["cat dog", "dog dog"]])
    total = 1 << 20
    cat = math.log(4 / (4 + total)) - math.log(2 / (4 + total))
    dog = math.log(2 / (4 + total)) - math.log(4 / (4 + total))
    scores = config.score(["cat dog dog", "dog", "", "cat"], config.log_ratio(target, pool))
    np.testing.assert_allclose(scores, [(cat + 2 * dog) / 3, dog, -np.inf, cat], rtol=1e-5)


def test_share_smooths_the_target_with_the_pool():
    target, pool = np.array([3, 0]), np.array([1, 3])
    ratio = np.array([4 / 5, 1 / 5]) / np.array([2 / 6, 4 / 6])
    found = DSIR(buckets=2, share=0.25).log_ratio(target, pool)
    np.testing.assert_allclose(found, np.log(0.75 + 0.25 * ratio))


def test_bigrams_are_counted_too():
    config = DSIR(max_n=2)
    assert config.count([["a b c", "d"]]).sum() == 4 + 2


def test_finds_the_target_whatever_the_length(texts):
    strange = [" ".join(f"w{(7 * i + j) % 97}" for j in range(20 + 9 * i)) for i in range(40)]
    pool = [*strange, *texts[:20]]
    selection = select(pool, "dsir", 20, target=texts[20:])
    assert set(selection.indices) == set(range(40, 60))
    assert selection.report["quantiles_chosen"]["0.0"] > selection.report["quantiles"]["0.5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_n": 0}, "max_n=0 must be at least 1"),
        ({"buckets": 1}, "buckets=1 must be at least 2"),
        ({"smoothing": 0}, "smoothing=0 must be positive"),
        ({"share": 0}, r"share=0 must lie in \(0, 1\]"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        DSIR(**arguments)
