"""A prompt's sentences and words, their tokens, and the text that chosen words make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_efficiency.generation.compression.segments import Span, sentence_spans, word_spans
from hf_efficiency.integrations.transformers.compression.parts import JOIN, Parts
from hf_efficiency.integrations.transformers.compression.scoring import encode


@dataclass(frozen=True)
class Units:
    """Spans in the prompt's text.

    Attributes:
        text: The prompt's text.
        offsets: Spans of its tokens, by the target's tokenizer.
        sentences: Spans of the sentences.
        sentence_part: The part of each.
        sentence_tokens: Tokens of each.
        words: Spans of the words.
        word_sentence: The sentence of each.
        messages: The message (or segment) of each part.
    """

    MUST: ClassVar[float] = 100.0  # the priority of what always stays

    text: str
    offsets: list[Span]
    sentences: list[Span]
    sentence_part: list[int]
    sentence_tokens: list[int]
    words: list[Span]
    word_sentence: list[int]
    messages: list[int]

    @property
    def tokens(self) -> int:
        """Of the whole prompt."""
        return len(self.offsets)

    def part_tokens(self, part: int) -> int:
        """Tokens of a part."""
        return sum(n for n, p in zip(self.sentence_tokens, self.sentence_part, strict=True) if p == part)

    def sentence_text(self, sentence: int) -> str:
        """Of a sentence, with the white space before it."""
        start, end = self.sentences[sentence]
        return self.text[start:end]

    def word_part(self, word: int) -> int:
        """The part of a word."""
        return self.sentence_part[self.word_sentence[word]]

    def build(self, words: Sequence[int], parts: Sequence[int]) -> tuple[str, list[tuple[int, int, int]]]:
        """The text of some words (ascending), part by part in the given order, and where its pieces come from.

        Messages and segments are joined by an empty line; white space at the ends goes.
        """
        runs: dict[int, list[list[int]]] = {}
        for word in words:
            start, end = self.words[word]
            own = runs.setdefault(self.word_part(word), [])
            if own and own[-1][1] == start:
                own[-1][1] = end
            else:
                own.append([start, end])
        text, spans, last = "", [], None
        for part in parts:
            for place, (start, end) in enumerate(runs.get(part, ())):
                fresh = place == 0 and (last is None or self.messages[part] != last)
                if fresh:
                    text = text.rstrip() + JOIN if text else ""
                    start += len(self.text[start:end]) - len(self.text[start:end].lstrip())
                piece = self.text[start:end]
                spans.append((len(text), start, len(piece)))
                text += piece
                last = self.messages[part]
        text = text.rstrip()
        return text, [(at, source, min(n, len(text) - at)) for at, source, n in spans if at < len(text)]


def cut_units(parts: Parts, tokenizer: Any) -> Units:
    """The sentences and words of a prompt; a token counts for the sentence that it begins in."""
    _, offsets = encode(tokenizer, parts.text)
    sentences: list[Span] = []
    sentence_part: list[int] = []
    words: list[Span] = []
    word_sentence: list[int] = []
    for index, part in enumerate(parts.parts):
        for start, end in sentence_spans(parts.text[part.start : part.end]):
            found = word_spans(parts.text, part.start + start, part.start + end)
            if not found:
                continue
            sentences.append((part.start + start, part.start + end))
            sentence_part.append(index)
            words += found
            word_sentence += [len(sentences) - 1] * len(found)
    counts, at = [0] * len(sentences), 0
    for start, _ in offsets:
        while at + 1 < len(sentences) and start >= sentences[at][1]:
            at += 1
        counts[at] += 1
    return Units(
        parts.text, offsets, sentences, sentence_part, counts, words, word_sentence, [p.message for p in parts.parts]
    )
