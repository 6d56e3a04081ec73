"""K-means: cluster the pool, and take from each cluster in proportion to its size or evenly.

The proportional rule is that of stratified sampling; taking the rows nearest to the centers keeps prototypes, the
farthest keeps hard ones (Sorscher et al., "Beyond neural scaling laws", NeurIPS 2022, section 4). Shape legend: n rows,
d features, c clusters, k chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from hf_efficiency.selection.optional import require

if TYPE_CHECKING:
    from numpy.typing import NDArray

Within = Literal["random", "nearest", "farthest"]
_BATCH = 4096


def kmeans(
    features: NDArray[np.float32], clusters: int, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The cluster of each row, (n,), and its distance to the center, (n,), by scikit-learn's mini-batch k-means.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: there are more clusters than rows.
    """
    if not 1 <= clusters <= len(features):
        raise ValueError(f"clusters={clusters} must lie between 1 and the {len(features)} rows of the pool.")
    cluster = require("sklearn.cluster", "the strategy 'kmeans'")
    model = cluster.MiniBatchKMeans(clusters, random_state=seed, n_init=3, batch_size=_BATCH)
    labels = model.fit_predict(features).astype(np.int64)
    distances = np.linalg.norm(features - model.cluster_centers_[labels], axis=1)
    return labels, distances.astype(np.float32)


def allocate(sizes: NDArray[np.int64], k: int, *, proportional: bool = True) -> NDArray[np.int64]:
    """How many rows each cluster gives, (c,), k in all and none more than it has.

    Proportional shares are rounded by largest remainders; even shares pass on what small clusters lack.
    """
    sizes = np.asarray(sizes, np.int64)
    if k > sizes.sum():
        raise ValueError(f"k={k} is above the {sizes.sum()} rows of all clusters.")
    if proportional:
        shares = sizes * k / sizes.sum()
        counts = np.floor(shares).astype(np.int64)
        rest = np.argsort(-(shares - counts), kind="stable")[: k - counts.sum()]
        counts[rest] += 1
        return counts
    counts = np.zeros_like(sizes)
    while counts.sum() < k:
        open_ = np.flatnonzero(counts < sizes)
        share = max(1, (k - int(counts.sum())) // len(open_))
        for i in open_[: k - int(counts.sum())]:
            counts[i] += min(share, sizes[i] - counts[i], k - counts.sum())
    return counts


def choose_from_clusters(
    labels: NDArray[np.int64],
    distances: NDArray[np.floating],
    k: int,
    *,
    within: Within = "random",
    proportional: bool = True,
    seed: int = 0,
) -> NDArray[np.int64]:
    """k rows in the order of the pool.

    Args:
        labels: Cluster of each row, (n,).
        distances: To the center, (n,).
        k: Rows to choose.
        within: Which rows of a cluster.
        proportional: Clusters give in proportion to their size; off: evenly.
        seed: Of the random choice.
    """
    if within not in ("random", "nearest", "farthest"):
        raise ValueError(f"within={within!r} is unknown: use 'random', 'nearest' or 'farthest'.")
    names, sizes = np.unique(labels, return_counts=True)
    key = {"random": np.random.default_rng(seed).random(len(labels)), "nearest": distances, "farthest": -distances}
    order = np.lexsort((key[within], labels))
    starts = np.searchsorted(labels[order], names)
    counts = allocate(sizes, k, proportional=proportional)
    return np.sort(np.concatenate([order[a : a + c] for a, c in zip(starts, counts, strict=True)])).astype(np.int64)
