"""Rules of quality for web text: length, symbols, repetition.

The rules are those of Gopher (Rae et al. 2021, section A.1.1 and Table A1) and C4's lorem ipsum and brace filters
(Raffel et al. 2020); every bound can be changed or switched off.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
_BULLETS = ("•", "●", "‣", "-", "*")
_ELLIPSES = ("...", "…")
_WORDS = re.compile(r"\S+")


@dataclass(frozen=True)
class QualityRules:
    """Bounds; None switches a rule off. Shares are of words, lines or characters as named.

    Attributes:
        min_words: Words at least.
        max_words: Words at most.
        min_mean_word: Characters of a word on average, at least.
        max_mean_word: The same, at most.
        max_symbols: `#` and ellipses for each word.
        max_bullets: Share of lines that begin with a bullet.
        max_ellipsis: Share of lines that end with an ellipsis.
        min_letters: Share of words with a letter in them.
        min_stop_words: Different words of a list of eight of the commonest English ones; for other languages None.
        max_duplicate_lines: Share of lines that stood there before.
        max_top_ngram: Share of characters in the most frequent run of 2, 3 and 4 words; each its own bound.
        max_repeated_ngram: Share of characters in runs of 5 to 10 words that occur twice or more; the bound is that for
            5 words and falls by .01 a word.
        forbidden: Phrases that throw a text out, in lower case.
    """

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word: float | None = 3.0
    max_mean_word: float | None = 10.0
    max_symbols: float | None = 0.1
    max_bullets: float | None = 0.9
    max_ellipsis: float | None = 0.3
    min_letters: float | None = 0.8
    min_stop_words: int | None = 2
    max_duplicate_lines: float | None = 0.3
    max_top_ngram: tuple[float, float, float] | None = (0.20, 0.18, 0.16)
    max_repeated_ngram: float | None = 0.15
    forbidden: tuple[str, ...] = ("lorem ipsum",)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"{field.name}={value} must not be negative; None switches the rule off.")
        if self.min_words is not None and self.max_words is not None and self.min_words > self.max_words:
            raise ValueError(f"min_words={self.min_words} is above max_words={self.max_words}.")

    def broken(self, text: str) -> list[str]:
        """The names of the rules that the text breaks; an empty list for a good one."""
        words = _WORDS.findall(text)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return [*self._word_rules(text, words), *self._line_rules(lines), *self._repetition(words)]

    def score(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Minus the number of rules that each text breaks, (n,); 0 is best."""
        return np.array([-len(self.broken(text)) for text in texts], np.float32)

    def _word_rules(self, text: str, words: list[str]) -> list[str]:
        n = len(words)
        share = max(n, 1)
        mean = sum(map(len, words)) / share
        symbols = (text.count("#") + sum(text.count(mark) for mark in _ELLIPSES)) / share
        letters = sum(any(character.isalpha() for character in word) for word in words) / share
        stops = len(_STOP_WORDS.intersection(word.lower().strip(".,;:!?\"'") for word in words))
        lowered = text.lower()
        return [
            *_outside("words", n, self.min_words, self.max_words),
            *_outside("mean_word", mean, self.min_mean_word, self.max_mean_word),
            *_outside("symbols", symbols, None, self.max_symbols),
            *_outside("letters", letters, self.min_letters, None),
            *_outside("stop_words", stops, self.min_stop_words, None),
            *(["forbidden"] if any(phrase in lowered for phrase in self.forbidden) else []),
        ]

    def _line_rules(self, lines: list[str]) -> list[str]:
        share = max(len(lines), 1)
        bullets = sum(line.startswith(_BULLETS) for line in lines) / share
        ellipsis = sum(line.endswith(_ELLIPSES) for line in lines) / share
        duplicates = (len(lines) - len(set(lines))) / share
        return [
            *_outside("bullets", bullets, None, self.max_bullets),
            *_outside("ellipsis", ellipsis, None, self.max_ellipsis),
            *_outside("duplicate_lines", duplicates, None, self.max_duplicate_lines),
        ]

    def _repetition(self, words: list[str]) -> list[str]:
        total = max(1, sum(map(len, words)))
        found = []
        for n, bound in zip((2, 3, 4), self.max_top_ngram or (), strict=False):
            runs = Counter(zip(*(words[i:] for i in range(n)), strict=False))
            run, count = max(runs.items(), key=lambda item: item[1], default=((), 0))
            if count > 1 and count * sum(map(len, run)) / total > bound:
                found.append(f"top_{n}gram")
        if self.max_repeated_ngram is not None:
            found += [
                f"repeated_{n}gram"
                for n in range(5, 11)
                if _repeated(words, n) / total > self.max_repeated_ngram - 0.01 * (n - 5)
            ]
        return found


def _outside(name: str, value: float, low: float | None, high: float | None) -> list[str]:
    too_low = low is not None and value < low
    return [name] if too_low or value > (math.inf if high is None else high) else []


def _repeated(words: list[str], n: int) -> int:
    """Characters of words that lie in a run of n words which occurs again later or earlier, each word counted once."""
    runs = list(zip(*(words[i:] for i in range(n)), strict=False))
    counts = Counter(runs)
    covered, end = 0, 0
    for i, run in enumerate(runs):
        if counts[run] > 1:
            covered += sum(map(len, words[max(i, end) : i + n]))
            end = i + n
    return covered
