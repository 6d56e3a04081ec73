"""A cheap classifier of quality, trained on seeds against the pool.

Wang et al., "Ultra-FineWeb: Efficient Data Filtering and Verification for High-Quality LLM Training Data" (2025),
section 3: a linear model over hashed n-grams (there fastText) tells verified good texts from others. Here: logistic
regression over the hashed n-grams of this package. Shape legend: n documents, m buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_efficiency.selection.hashing import buckets, flat_runs, in_batches
from hf_efficiency.selection.optional import require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_NEEDS = "the strategy 'classifier'"


@dataclass(frozen=True)
class QualityClassifier:
    """Settings.

    Attributes:
        max_n: Longest n-gram in words.
        buckets: Of the hashed n-grams.
        C: Inverse strength of the L2 penalty, as in scikit-learn.
        negatives: Texts of the pool that stand for the rest, for each text of the target.
        seed: Which these are.
    """

    max_n: int = 2
    buckets: int = 1 << 18
    C: float = 10.0
    negatives: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("max_n", self.max_n), ("buckets", self.buckets), ("negatives", self.negatives)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if self.C <= 0:
            raise ValueError(f"C={self.C} must be positive.")

    def features(self, texts: Sequence[str]) -> Any:
        """Square roots of the counts, each row of length one, as a SciPy CSR matrix (n, m)."""
        sparse = require("scipy.sparse", _NEEDS)
        blocks = []
        for part in in_batches(texts):
            rows, hashes = flat_runs(part, self.max_n)
            columns = buckets(hashes, self.buckets)
            block = sparse.coo_matrix(
                (np.ones(len(rows), np.float32), (rows, columns)), (len(part), self.buckets)
            ).tocsr()
            # the squares of the roots are the counts: a row's length is the root of its sum
            totals = np.asarray(block.sum(1)).ravel()
            block.data = np.sqrt(block.data / np.repeat(totals, np.diff(block.indptr)))
            blocks.append(block)
        return sparse.vstack(blocks).tocsr() if blocks else sparse.csr_matrix((0, self.buckets), dtype=np.float32)

    def fit(self, positive: Sequence[str], negative: Sequence[str]) -> Any:
        """A trained `sklearn.linear_model.LogisticRegression`.

        Raises:
            ImportError: scikit-learn is missing.
            ValueError: one of the classes is empty.
        """
        if not positive or not negative:
            raise ValueError(f"the classifier has {len(positive)} good and {len(negative)} other texts; it needs both.")
        linear = require("sklearn.linear_model", _NEEDS)
        x = self.features([*positive, *negative])
        y = np.arange(len(positive) + len(negative)) < len(positive)
        model = linear.LogisticRegression(C=self.C, max_iter=300, class_weight="balanced", random_state=self.seed)
        return model.fit(x, y)

    def score(self, texts: Sequence[str], model: Any) -> NDArray[np.float32]:
        """Probability that each text is good, (n,)."""
        return np.asarray(model.predict_proba(self.features(texts))[:, 1], np.float32)
