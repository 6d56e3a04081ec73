"""Parts of a prompt, and the sentences, words and named spans of a text.

A span is (start, end) in characters. Sentences and words cover the text without gaps, white space before the visible
part, so that spans written one after the other read as the text does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Span = tuple[int, int]

ROLES = ("instruction", "context", "question")
_BREAK = re.compile(
    r"[.!?][\"')\]\u201d\u2019]*(?=\s+[\"'(\[\u201c\u2018*\-]*[A-Z0-9])|\n(?=\s*\n)|\n(?=\s*(?:[*\-]|\d+[.)])\s)"
)
_NO_END = re.compile(r"(?:\b(?:e\.g|i\.e|etc|cf|vs|Mr|Mrs|Ms|Dr|Prof|St|No|Fig|Sec|[A-Z]))\.$")
_WORD = re.compile(r"\s*\S+")
_CAPITAL = re.compile(r"[A-Z][A-Za-z'\u2019\-]*")


@dataclass(frozen=True)
class Segment:
    """A part of a prompt.

    Attributes:
        text: What it says.
        role: "instruction", "context" (a document, a demonstration) or "question".
        ratio: Share of its tokens to keep; None leaves it to the budget controller.
    """

    text: str
    role: str = "context"
    ratio: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"the text of a segment must be a string, not {type(self.text).__name__}")
        if self.role not in ROLES:
            raise ValueError(f"the role of a segment is {self.role!r}; it must be one of {', '.join(ROLES)}")
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise ValueError(f"the ratio of a segment is {self.ratio}; it must lie in 0..1 (or be None)")


def sentence_spans(text: str) -> list[Span]:
    """Sentences, list items and paragraphs' ends; code and tables are cut at empty lines."""
    cuts = [0]
    for match in _BREAK.finditer(text):
        end = match.end()
        if not _NO_END.search(text, max(0, end - 6), end) and text[cuts[-1] : end].strip():
            cuts.append(end)
    if len(cuts) > 1 and not text[cuts[-1] :].strip():
        cuts.pop()
    return list(zip(cuts, [*cuts[1:], len(text)], strict=True)) if text else []


def word_spans(text: str, start: int = 0, end: int | None = None) -> list[Span]:
    """Words with the white space before them, within text[start:end]; the last one takes what white space is left."""
    end = len(text) if end is None else end
    spans = [match.span() for match in _WORD.finditer(text, start, end)]
    if spans:
        spans[-1] = (spans[-1][0], end)
    return spans


def has_digit(word: str) -> bool:
    """Whether a word holds a digit."""
    return any(character.isdigit() for character in word)


def name_flags(words: list[str]) -> list[bool]:
    """Which words of one sentence belong to a name.

    A capitalised word is part of a name unless it begins the sentence; the first word is, where a capitalised one
    follows. So are abbreviations in capitals and words with capitals inside. "I" is none.
    """
    bare = [word.strip().strip("\"'()[]{}.,;:!?*`\u201c\u201d\u2018\u2019") for word in words]
    capital = [_CAPITAL.fullmatch(word) is not None and word != "I" for word in bare]
    flags = []
    for i, word in enumerate(bare):
        inner = len(word) > 1 and any(c.isupper() for c in word[1:]) and word[0].isalpha()
        follows = i + 1 < len(bare) and capital[i + 1] and len(word) > 3
        flags.append(inner or (capital[i] and (i > 0 or follows)))
    return flags
