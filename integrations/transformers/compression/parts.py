"""What users call a prompt (a string, segments, chat messages) as parts of one text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_efficiency.generation.compression.segments import Segment

JOIN = "\n\n"
_QUESTION_SHARE = 0.25  # a last paragraph of a lone message that is no longer than this share of it asks something


@dataclass(frozen=True)
class Part:
    """Characters start..end of the text; `message` is the index of the chat message (or segment) it belongs to."""

    start: int
    end: int
    role: str
    message: int
    ratio: float | None = None


@dataclass(frozen=True)
class Parts:
    """A prompt's text, its parts in order, the question, and the chat it came from."""

    text: str
    parts: list[Part]
    question: str | None
    messages: list[dict[str, Any]] | None = None


def read_parts(prompt: Any, question: str | None) -> Parts:
    """The parts of a string, of a list of strings or segments, or of chat messages.

    Raises:
        TypeError: It is none of these, or a message's content is no string.
        ValueError: It is empty.
    """
    if question is not None and not isinstance(question, str):
        raise TypeError(f"question must be a string, not {type(question).__name__}")
    question = question if question and question.strip() else None
    messages = None
    if isinstance(prompt, str):
        segments = [Segment(prompt)]
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(m, Mapping) for m in prompt):
        messages = [dict(message) for message in prompt]
        segments = [_message(message) for message in messages]
        if question is None:
            segments, question = _asked(segments, messages)
    elif isinstance(prompt, Sequence) and all(isinstance(s, str | Segment) for s in prompt):
        segments = [s if isinstance(s, Segment) else Segment(s) for s in prompt]
    else:
        raise TypeError(
            f"the prompt must be a string, a list of strings or Segments, or chat messages, not {type(prompt).__name__}"
        )
    if not any(segment.text.strip() for segment in segments):
        raise ValueError("the prompt is empty: there is nothing to compress")
    if question is None:
        question = " ".join(s.text.strip() for s in segments if s.role == "question") or None
    return Parts(JOIN.join(s.text for s in segments), _cut(segments, question), question, messages)


def _message(message: Mapping[str, Any]) -> Segment:
    content = message.get("content")
    if not isinstance(content, str):
        raise TypeError(
            f"the content of a message of role {message.get('role')!r} is {type(content).__name__}; only text can be "
            "compressed: give its text, and add other content afterwards"
        )
    return Segment(content, "instruction" if message.get("role") in ("system", "developer") else "context")


def _asked(segments: list[Segment], messages: list[dict[str, Any]]) -> tuple[list[Segment], str | None]:
    """A chat's question: its last message if a user wrote it; of a lone message, its short last paragraph."""
    talk = [i for i, segment in enumerate(segments) if segment.role == "context"]
    if not talk or messages[talk[-1]].get("role") != "user":
        return segments, None
    last = segments[talk[-1]]
    if len(talk) > 1:
        return [*segments[: talk[-1]], Segment(last.text, "question"), *segments[talk[-1] + 1 :]], last.text.strip()
    head, _, tail = last.text.rstrip().rpartition(JOIN)
    if head.strip() and len(tail) <= _QUESTION_SHARE * len(last.text):
        return segments, tail.strip()
    return segments, None


def _cut(segments: list[Segment], question: str | None) -> list[Part]:
    """Parts by their place; the last occurrence of the question in a context becomes a part of its own."""
    parts: list[Part] = []
    at = 0
    holds = [s.role == "question" for s in segments]
    hosts = [i for i, s in enumerate(segments) if question and not any(holds) and question in s.text]
    host = hosts[-1] if hosts else None
    for i, segment in enumerate(segments):
        end = at + len(segment.text)
        if i == host and question is not None:
            begin = at + segment.text.rindex(question)
            stop = begin + len(question)
            pieces = [(at, begin, segment.role), (begin, stop, "question"), (stop, end, segment.role)]
        else:
            pieces = [(at, end, segment.role)]
        for a, b, role in pieces:
            if b > a:
                cut_out = i == host and role == "question"
                parts.append(Part(a, b, role, i, None if cut_out else segment.ratio))
        at = end + len(JOIN)
    return parts
