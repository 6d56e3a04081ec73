"""Band keys and shingles of all documents in temporary files, so that deduplication needs little memory.

Shape legend: n documents, b bands, q pairs.
"""

from __future__ import annotations

import os
import tempfile
from typing import IO, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_efficiency.selection.hashing import Grams

_CHUNK_SHINGLES = 1 << 20


class Spool:
    """A context manager; the files are gone at its end."""

    def __enter__(self) -> Spool:
        self._keys: IO[bytes] = tempfile.TemporaryFile()
        self._shingles: IO[bytes] = tempfile.TemporaryFile()
        self._chunks: list[tuple[int, int]] = []  # position in the file and documents of each batch of keys
        self._offsets: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
        return self

    def __exit__(self, *error: object) -> None:
        self._keys.close()
        self._shingles.close()

    @property
    def bounds(self) -> NDArray[np.int64]:
        """Where each document's shingles begin, and the end of the last, (n + 1,)."""
        if len(self._offsets) > 1:
            self._offsets = [np.concatenate(self._offsets)]
        return self._offsets[0]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Shingles of each document, (n,)."""
        return np.diff(self.bounds)

    def add(self, grams: Grams, keys: NDArray[np.uint32]) -> None:
        """More documents: their distinct shingles in rising order, and their keys (b, n)."""
        self._chunks.append((self._keys.tell(), keys.shape[1]))
        self._keys.write(keys.tobytes())
        self._offsets.append(grams.offsets[1:] + self._offsets[-1][-1])
        self._shingles.write((grams.hashes >> np.uint64(32)).astype(np.uint32).tobytes())

    def keys(self, band: int) -> NDArray[np.uint32]:
        """The keys of one band, (n,)."""
        parts = []
        for position, count in self._chunks:
            self._keys.seek(position + 4 * band * count)
            parts.append(np.frombuffer(self._keys.read(4 * count), np.uint32))
        return np.concatenate(parts) if parts else np.empty(0, np.uint32)

    def jaccard(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.float64]:
        """Jaccard similarity of each pair of documents' sets of shingles, (q,)."""
        self._shingles.flush()
        bounds = self.bounds
        sizes = np.cumsum(bounds[left + 1] - bounds[left] + bounds[right + 1] - bounds[right])
        result = np.empty(len(left))
        start = 0
        while start < len(left):
            before = sizes[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(sizes, before + _CHUNK_SHINGLES)))
            result[start:stop] = self._jaccard(left[start:stop], right[start:stop])
            start = stop
        return result

    def _jaccard(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.float64]:
        documents, places = np.unique(np.concatenate([left, right]), return_inverse=True)
        bounds, file = self.bounds, self._shingles.fileno()
        firsts, lasts = (4 * bounds[documents]).tolist(), (4 * bounds[documents + 1]).tolist()
        flat = np.frombuffer(
            b"".join(os.pread(file, last - first, first) for first, last in zip(firsts, lasts, strict=True)), np.uint32
        )
        counts = bounds[documents + 1] - bounds[documents]
        starts = np.cumsum(counts) - counts
        sizes = counts[places]
        # every shingle with its pair's number in front: what both documents of a pair hold stands there twice
        pair = np.repeat(np.arange(len(places)) % len(left), sizes)
        within = np.arange(len(pair)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        tagged = (pair.astype(np.uint64) << np.uint64(32)) | flat[np.repeat(starts[places], sizes) + within]
        tagged.sort()
        twice = tagged[1:][tagged[1:] == tagged[:-1]] >> np.uint64(32)
        shared = np.bincount(twice.astype(np.int64), minlength=len(left))
        union = sizes[: len(left)] + sizes[len(left) :] - shared
        return shared / np.maximum(union, 1)
