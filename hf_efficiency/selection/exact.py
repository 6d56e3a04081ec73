"""Exact duplicates, by a 128-bit hash of the text without its case and with single spaces."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from hf_efficiency.selection.clusters import Clusters

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def exact_clusters(batches: Iterable[Sequence[str]], *, normalize: bool = True) -> Clusters:
    """Groups of equal texts; 16 bytes a document are held.

    Args:
        batches: Texts.
        normalize: Ignore the case and the kind and number of spaces. Off: bytes must be equal.
    """
    digests = b"".join(
        hashlib.blake2b(_normal(text) if normalize else text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        for texts in batches
        for text in texts
    )
    pairs = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    clusters = Clusters(len(pairs))
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    equal = (pairs[order][1:] == pairs[order][:-1]).all(1)
    for i in np.flatnonzero(equal):
        clusters.join(int(order[i]), int(order[i + 1]))
    return clusters


def _normal(text: str) -> bytes:
    return " ".join(text.lower().split()).encode("utf-8", "surrogatepass")
