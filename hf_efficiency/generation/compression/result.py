"""A compressed prompt, and the way back from an answer to the original words."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from hf_efficiency.generation.compression.segments import Span, sentence_spans

_MIN_MATCH = 4  # characters of an answer's run that may be found by chance


@dataclass(frozen=True)
class Compressed:
    """What `compress_prompt` returns.

    Attributes:
        text: The compressed prompt.
        original: The prompt before, parts joined by an empty line.
        kept: For each token of `original` by the target's tokenizer, whether its text stayed.
        spans: For each piece of `text`, in its order: (start in text, start in original, length), in characters.
        tokens: Tokens of `text` by the target's tokenizer.
        original_tokens: Of `original`.
        method: The method that chose.
        messages: The chat with compressed contents, where a chat was given; messages left empty are dropped.
        scores: Relevance of each sentence to the question, by its span in `original`; empty without a question.
    """

    text: str
    original: str
    kept: list[bool]
    spans: list[tuple[int, int, int]]
    tokens: int
    original_tokens: int
    method: str
    messages: list[dict[str, Any]] | None = None
    scores: dict[Span, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Tokens kept, as a share."""
        return self.tokens / self.original_tokens

    def __str__(self) -> str:
        return self.text

    def recover(self, answer: str) -> str:
        """The answer with what it quotes from `text` replaced by the original's words.

        LongLLMLingua, section 4.4: the longest runs of words of the answer that `text` holds are looked up in the map
        of what was kept, and the shortest stretch of the original around them takes their place. Runs do not grow
        over the end of a sentence of the original.
        """
        words = [match.span() for match in re.finditer(r"\S+", answer)]
        pieces, done, i = [], 0, 0
        while i < len(words):
            for j in range(len(words), i, -1):
                start, end = words[i][0], words[j - 1][1]
                found = self._source(answer[start:end])
                if found is not None:
                    pieces += [answer[done:start], found]
                    done, i = end, j
                    break
            else:
                i += 1
        return "".join(pieces) + answer[done:]

    def _source(self, run: str) -> str | None:
        """The original's words behind a run of at least two words of `text`, or None."""
        if len(run) < _MIN_MATCH or not re.search(r"\s", run):
            return None
        pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, run.split())) + r"(?!\w)"
        match = re.search(pattern, self.text)
        if match is None:
            return None
        first, last = self._origin(match.start()), self._origin(match.end() - 1)
        if first is None or last is None or last < first:
            return None
        inside = next((s for s in self._sentences() if s[0] <= first and last < s[1]), None)
        return " ".join(self.original[first : last + 1].split()) if inside is not None else None

    def _origin(self, position: int) -> int | None:
        """The place in the original of a character of `text`; None for one that joins parts."""
        for start, source, length in self.spans:
            if start <= position < start + length:
                return source + position - start
        return None

    def _sentences(self) -> list[Span]:
        return sentence_spans(self.original)


def kept_map(offsets: list[Span], spans: list[tuple[int, int, int]]) -> list[bool]:
    """For each token's span in the original, whether all its visible characters stayed."""
    inside = sorted((source, source + length) for _, source, length in spans)
    result, i = [], 0
    for start, end in offsets:
        while i < len(inside) and inside[i][1] < end:
            i += 1
        result.append(start < end and i < len(inside) and inside[i][0] <= start and end <= inside[i][1])
    return result
