"""Groups of duplicates, as a union-find forest in one array."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Clusters:
    """n documents, each alone at first. The smallest member stands for a cluster."""

    def __init__(self, n: int) -> None:
        self._parent = np.arange(n, dtype=np.int64)

    def find(self, i: int) -> int:
        """The document that stands for the cluster of document i."""
        parent = self._parent
        root = i
        while parent[root] != root:
            root = int(parent[root])
        while parent[i] != root:
            parent[i], i = root, int(parent[i])
        return root

    def same(self, i: int, j: int) -> bool:
        """Whether two documents are in one cluster."""
        return self.find(i) == self.find(j)

    def join(self, i: int, j: int) -> None:
        """Make one cluster of two."""
        a, b = self.find(i), self.find(j)
        if a != b:
            self._parent[max(a, b)] = min(a, b)

    def labels(self) -> NDArray[np.int64]:
        """The document that stands for the cluster of each, (n,)."""
        labels = self._parent
        while True:
            higher = labels[labels]
            if np.array_equal(higher, labels):
                return labels.copy()
            labels = higher

    def sizes(self) -> NDArray[np.int64]:
        """Members of the cluster of each document, (n,)."""
        labels = self.labels()
        return np.bincount(labels, minlength=len(labels))[labels]
