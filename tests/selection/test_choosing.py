import numpy as np
import pytest

from hf_efficiency.selection.choosing import check_k, draw, gumbel_top_k, quantile_band, ranks, top_k


def test_top_k_is_stable_and_ordered():
    scores = np.array([1.0, 3.0, 3.0, -np.inf, 2.0])
    assert top_k(scores, 3).tolist() == [1, 2, 4]
    assert top_k(np.arange(100.0), 3).tolist() == [99, 98, 97]
    with pytest.raises(ValueError, match=r"k=5 is above the 4 rows that may be chosen"):
        top_k(scores, 5)


def test_nan_is_refused_with_its_row():
    with pytest.raises(ValueError, match=r"holds NaN for 1 of 3 rows \(first: row 1\).*float32 or bfloat16"):
        top_k(np.array([1.0, np.nan, 2.0]), 1)


def test_gumbel_draws_in_proportion():
    """The first of two rows is drawn with probability w₀ / (w₀ + w₁) = 3/4."""
    weights = np.log(np.array([3.0, 1.0]))
    hits = sum(gumbel_top_k(weights, 1, seed)[0] == 0 for seed in range(2000))
    assert hits / 2000 == pytest.approx(0.75, abs=0.03)
    assert gumbel_top_k(weights, 2, 0, temperature=0).tolist() == [0, 1]
    with pytest.raises(ValueError, match="temperature=-1 must not be negative"):
        gumbel_top_k(weights, 1, 0, temperature=-1)


def test_quantile_band():
    scores = np.array([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, np.inf])
    assert np.flatnonzero(quantile_band(scores, 0.2, 0.5)).tolist() == [2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"low=0.6 to high=0.5 must satisfy"):
        quantile_band(scores, 0.6, 0.5)


def test_ranks_share_places():
    np.testing.assert_allclose(ranks(np.array([5.0, 1.0, 5.0, 9.0])), [0.5, 0.0, 0.5, 1.0])


def test_draw_is_from_the_allowed_and_repeats():
    allowed = np.array([True, False, True, True])
    assert set(draw(allowed, 3, 0)) == {0, 2, 3}
    assert draw(allowed, 2, 5).tolist() == draw(allowed, 2, 5).tolist()


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, "k=0 must be at least 1"),
        (11, ValueError, "k=11 is above the pool of 10 rows: choose at most 10"),
        (1.5, ValueError, r"k=1.5 is a share of the pool and must lie in \(0, 1\]"),
        (True, TypeError, "k=True must be a number of rows"),
        ("3", TypeError, "k='3' must be a number of rows"),
    ],
)
def test_bad_k(k, error, message):
    with pytest.raises(error, match=message):
        check_k(k, 10)


def test_k_as_a_share():
    assert [check_k(k, 10) for k in (0.25, 1.0, 0.01, 7)] == [2, 10, 1, 7]
