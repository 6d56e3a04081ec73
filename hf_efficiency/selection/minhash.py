"""Near-duplicates by MinHash and locality-sensitive hashing, with an exact check of every candidate.

Broder, "On the resemblance and containment of documents" (1997); banding as in Leskovec, Rajaraman and Ullman, "Mining
of Massive Datasets", section 3.4. Because candidates are checked exactly, the bands are chosen for recall alone.
Shape legend: n documents, p permutations, b bands of r permutations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from hf_efficiency.selection.clusters import Clusters
from hf_efficiency.selection.hashing import Grams, in_batches, in_blocks, mix, shingles
from hf_efficiency.selection.optional import require
from hf_efficiency.selection.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

_RECALL = 0.995  # of a pair that is exactly as similar as the threshold
_SMALL = 32  # documents of a group whose pairs are all compared
_EMPTY = np.uint32(0xFFFFFFFF)


@dataclass(frozen=True)
class MinHash:
    """Settings.

    Attributes:
        threshold: Jaccard similarity of the sets of shingles from which on two documents count as duplicates.
        ngram: Words of a shingle.
        num_perm: Permutations of a signature.
        seed: Of the permutations.
        backend: `numpy`, or `rensa` (the extra `hf_efficiency[data]`) for its compiled signatures.
    """

    threshold: float = 0.7
    ngram: int = 5
    num_perm: int = 128
    seed: int = 0
    backend: Literal["numpy", "rensa"] = "numpy"

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} is a Jaccard similarity and must lie in (0, 1].")
        for name, value in (("ngram", self.ngram), ("num_perm", self.num_perm)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if self.backend not in ("numpy", "rensa"):
            raise ValueError(f"backend={self.backend!r} is unknown: use 'numpy' or 'rensa'.")

    @property
    def rows(self) -> int:
        """Permutations of a band: as many as still find a pair at the threshold with probability .995."""
        fitting = [
            r for r in range(1, self.num_perm + 1)
            if 1 - (1 - self.threshold**r) ** (self.num_perm // r) >= _RECALL
        ]  # fmt: skip
        return max(fitting, default=1)

    def signatures(self, grams: Grams) -> NDArray[np.uint32]:
        """The smallest of the permuted hashes of each document, (n, p)."""
        if self.backend == "rensa":
            return _rensa_signatures(grams, self.num_perm, self.seed)
        result = np.full((self.num_perm, len(grams)), _EMPTY, np.uint32)
        xor, factor = self._permutations()
        for rows, hashes, starts in in_blocks(grams):
            part = (hashes >> np.uint64(32)).astype(np.uint32)
            scratch = np.empty_like(part)
            for i in range(self.num_perm):
                np.bitwise_xor(part, xor[i], out=scratch)
                np.multiply(scratch, factor[i], out=scratch)
                result[i, rows] = np.minimum.reduceat(scratch, starts)
        return np.ascontiguousarray(result.T)

    def band_keys(self, signatures: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """One key for each band, (b, n): equal where all permutations of the band are."""
        rows = self.rows
        bands = self.num_perm // rows
        wide = signatures[:, : bands * rows].reshape(len(signatures), bands, rows).astype(np.uint64)
        key = np.zeros(wide.shape[:2], np.uint64)
        for i in range(rows):
            key = mix(key + wide[:, :, i] + np.uint64(1))
        return np.ascontiguousarray((key >> np.uint64(32)).astype(np.uint32).T)

    def clusters(self, batches: Iterable[Sequence[str]]) -> Clusters:
        """Groups of near-duplicates; documents are linked where an exact Jaccard similarity reaches the threshold.

        Keys and shingles go to temporary files, so that memory holds some 40 bytes a document.
        """
        with Spool() as spool:
            for texts in batches:
                for part in in_batches(texts):
                    self._add(spool, part)
            clusters = Clusters(len(spool.counts))
            for band in range(self.num_perm // self.rows):
                small: list[NDArray[np.int64]] = []
                for group in _groups(spool.keys(band), spool.counts):
                    if len(group) <= _SMALL:
                        small.append(group)
                    else:
                        self._join_large(spool, clusters, group)
                self._join(spool, clusters, *_pairs_within(small))
        return clusters

    def pairs(self, texts: Sequence[str]) -> list[tuple[int, int]]:
        """All pairs (i, j), i < j, whose Jaccard similarity reaches the threshold and that share a band."""
        with Spool() as spool:
            for part in in_batches(texts):
                self._add(spool, part)
            n = len(spool.counts)
            codes = []
            for band in range(self.num_perm // self.rows):
                left, right = _pairs_within(list(_groups(spool.keys(band), spool.counts)))
                codes.append(left * n + right)
            left, right = np.divmod(np.unique(np.concatenate(codes)), max(n, 1))
            near = spool.jaccard(left, right) >= self.threshold
        return list(zip(left[near].tolist(), right[near].tolist(), strict=True))

    def _join(self, spool: Spool, clusters: Clusters, left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
        labels = clusters.labels()
        apart = labels[left] != labels[right]
        left, right = left[apart], right[apart]
        near = spool.jaccard(left, right) >= self.threshold
        for a, b in zip(left[near].tolist(), right[near].tolist(), strict=True):
            clusters.join(a, b)

    def _join_large(self, spool: Spool, clusters: Clusters, group: NDArray[np.int64]) -> None:
        """Compares the first of a large group with all others and goes on with those that it is no duplicate of."""
        labels = np.fromiter((clusters.find(int(i)) for i in group), np.int64, len(group))
        group = group[np.sort(np.unique(labels, return_index=True)[1])]
        while len(group) > 1:
            first, rest = group[0], group[1:]
            near = spool.jaccard(np.full(len(rest), first), rest) >= self.threshold
            for other in rest[near].tolist():
                clusters.join(int(first), other)
            group = rest[~near]

    def _add(self, spool: Spool, texts: Sequence[str]) -> None:
        grams = unique_per_document(shingles(texts, self.ngram))
        spool.add(grams, self.band_keys(self.signatures(grams)))

    def _permutations(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        generator = np.random.default_rng(self.seed)
        xor = generator.integers(0, 1 << 32, self.num_perm, dtype=np.uint32)
        return xor, generator.integers(0, 1 << 31, self.num_perm, dtype=np.uint32) * np.uint32(2) + np.uint32(1)


def unique_per_document(grams: Grams) -> Grams:
    """Each document's distinct hashes in rising order."""
    document = grams.documents
    order = np.lexsort((grams.hashes, document))
    hashes = grams.hashes[order]
    new = np.ones(len(hashes), bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (document[1:] != document[:-1])
    counts = np.bincount(document[new], minlength=len(grams))
    return Grams.of(hashes[new], counts)


def _groups(keys: NDArray[np.uint32], counts: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Documents that share a key, two or more at a time, each group in rising order; empty documents are left out."""
    order = np.argsort(keys, kind="stable")
    order = order[counts[order] > 0]
    values = keys[order]
    edges = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1], [True]])) if len(values) else np.empty(0)
    sizes = np.diff(edges)
    for i in np.flatnonzero(sizes > 1):
        yield order[int(edges[i]) : int(edges[i + 1])]


def _pairs_within(groups: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All pairs of documents (left < right) that are in one group."""
    by_size: dict[int, list[NDArray[np.int64]]] = {}
    for group in groups:
        by_size.setdefault(len(group), []).append(group)
    left, right = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for size, alike in by_size.items():
        stacked = np.stack(alike)
        i, j = np.triu_indices(size, 1)
        left.append(stacked[:, i].ravel())
        right.append(stacked[:, j].ravel())
    return np.concatenate(left), np.concatenate(right)


def _rensa_signatures(grams: Grams, num_perm: int, seed: int) -> NDArray[np.uint32]:
    rensa = require("rensa", "MinHash signatures by rensa (backend='rensa')")
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        grams.hashes.tolist(), grams.offsets.tolist(), num_perm, seed
    )
    return np.asarray(matrix.to_rows(), np.uint32).reshape(len(grams), num_perm)
