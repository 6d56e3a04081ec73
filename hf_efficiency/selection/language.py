"""Which texts are in the wanted languages, by py3langid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_efficiency.selection.optional import require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_READ = 2000  # characters of a text that are looked at


@dataclass(frozen=True)
class Language:
    """Settings.

    Attributes:
        languages: Two-letter codes of ISO 639-1, such as `("en", "de")`.
        threshold: Probability of these languages together from which on a text is kept.
    """

    languages: tuple[str, ...] = ("en",)
    threshold: float = 0.8

    def __post_init__(self) -> None:
        if not isinstance(self.languages, tuple | list) or not self.languages:
            raise ValueError(f"languages={self.languages!r} must be a tuple of codes, such as ('en', 'de').")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} is a probability and must lie in (0, 1].")

    def identifier(self) -> Any:
        """py3langid's classifier with probabilities.

        Raises:
            ImportError: py3langid is missing.
            ValueError: a code that it does not know.
        """
        module = require("py3langid.langid", "the strategy 'language'")
        identifier = module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)
        known = {str(code) for code in identifier.nb_classes}
        unknown = sorted(set(self.languages) - known)
        if unknown:
            raise ValueError(f"py3langid does not know the languages {unknown}; it knows {', '.join(sorted(known))}.")
        return identifier

    def score(self, texts: Sequence[str], identifier: Any) -> NDArray[np.float32]:
        """Probability that each text is in one of the languages, (n,); 0 for an empty one."""
        wanted = set(self.languages)
        scores = np.zeros(len(texts), np.float32)
        for i, text in enumerate(texts):
            if text.strip():
                ranking = identifier.rank(text[:_READ])
                scores[i] = sum(float(p) for code, p in ranking if str(code) in wanted)
        return scores
