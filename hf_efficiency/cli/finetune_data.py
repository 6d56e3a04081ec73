"""The training file of `hf-efficiency finetune`: read, checked line by line, parted into training and held-out rows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_efficiency.evaluation import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HELD_OUT = 0.05
_SHAPES = '{"text": ...}, {"messages": [...]}, or {"prompt": ..., "completion": ...}'

Row = dict[str, Any]


@dataclass(frozen=True)
class TrainingData:
    """Rows of one kind.

    Attributes:
        kind: `"text"`, `"chat"` (messages) or `"completion"` (prompt and completion, either text or messages).
        train: Rows to train on.
        held_out: Rows to measure on.
        document: Whether the rows are pieces of one running text.
        description: The file's name, size and hash, for report and card.
    """

    kind: str
    train: list[Row]
    held_out: list[Row]
    document: bool
    description: str

    @property
    def conversational(self) -> bool:
        """Whether rows are made of messages, so that they need a chat template."""
        return self.kind == "chat" or isinstance(self.train[0].get("prompt"), list)


def read_data(path: str, eval_path: str | None) -> TrainingData:
    """Reads the training file and, if there is one, the held-out file; else the last 5 % of the rows are held out.

    Raises:
        ValueError: A file is missing, empty, no UTF-8, of an unknown kind, or has a line that is no row; the message
            names the line.
    """
    kind, rows = _read(path)
    if eval_path is not None:
        eval_kind, held_out = _read(eval_path)
        if eval_kind != kind:
            raise ValueError(
                f"--eval-data {eval_path} holds {eval_kind} rows, --data {path} {kind} rows: give one kind"
            )
        train = rows
    elif Path(path).suffix == ".txt":
        train, held_out = _part_text(rows[0]["text"])
    else:
        count = max(1, round(_HELD_OUT * len(rows)))
        train, held_out = rows[:-count], rows[-count:]
    if not train:
        raise ValueError(f"{path!r} has one row only, and one must be held out: give more rows, or --eval-data FILE")
    content = Path(path).read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:12]
    description = f"{Path(path).name}, {len(content):,} bytes, sha256 {digest}"
    return TrainingData(kind, train, held_out, Path(path).suffix == ".txt", description)


def _read(path: str) -> tuple[str, list[Row]]:
    suffix = Path(path).suffix
    if suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path!r} ends in {suffix or 'nothing'!r}: give a .txt file, or a .jsonl file of {_SHAPES}")
    text = read_text(path).text
    if suffix == ".txt":
        return "text", [{"text": text}]
    kinds: dict[str, int] = {}
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            kind, row = _row(line, f"{path}, line {number}")
            kinds.setdefault(kind, number)
            rows.append(row)
    if len(kinds) > 1:
        (first, a), (second, b) = list(kinds.items())[:2]
        raise ValueError(f"{path}: line {a} is a {first} row and line {b} a {second} row; a file holds one kind")
    return next(iter(kinds)), rows


def _row(line: str, where: str) -> tuple[str, Row]:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error.msg}): write one object a line, {_SHAPES}") from error
    if isinstance(data, dict):
        if isinstance(data.get("text"), str) and data["text"]:
            return "text", {"text": data["text"]}
        if "messages" in data:
            return "chat", {"messages": _messages(data["messages"], f"{where}: messages", ends_with_assistant=True)}
        if "prompt" in data and "completion" in data:
            return _completion(data["prompt"], data["completion"], where)
    raise ValueError(f"{where} is no row: write {_SHAPES}")


def _completion(prompt: Any, completion: Any, where: str) -> tuple[str, Row]:
    if isinstance(prompt, str) and isinstance(completion, str) and completion:
        return "completion", {"prompt": prompt, "completion": completion}
    if isinstance(prompt, list) and isinstance(completion, list):
        return "completion of messages", {
            "prompt": _messages(prompt, f"{where}: prompt"),
            "completion": _messages(completion, f"{where}: completion"),
        }
    raise ValueError(f"{where}: prompt and completion must both be text that is not empty, or both lists of messages")


def _messages(value: Any, where: str, *, ends_with_assistant: bool = False) -> list[dict[str, str]]:
    good = isinstance(value, list) and value and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )  # fmt: skip
    if not good:
        raise ValueError(f'{where} must be a list of {{"role": ..., "content": ...}} that is not empty')
    if ends_with_assistant and not any(m["role"] == "assistant" for m in value):
        raise ValueError(f"{where} hold nothing that the assistant says, so there is nothing to learn")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _part_text(text: str) -> tuple[list[Row], list[Row]]:
    """Cuts a text at the end of a line near its last 5 %."""
    cut = text.find("\n", int(len(text) * (1 - _HELD_OUT))) + 1
    if not 0 < cut < len(text):
        cut = int(len(text) * (1 - _HELD_OUT))
    return [{"text": text[:cut]}], [{"text": text[cut:]}]


def turns(rows: list[Row]) -> list[Row]:
    """One prompt and completion for each thing that the assistant says, for templates that can't mark them."""
    return [
        {"prompt": row["messages"][:i], "completion": [message]}
        for row in rows
        for i, message in enumerate(row["messages"])
        if message["role"] == "assistant" and i
    ]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, data: TrainingData, path: str | None) -> None:
    """Gives the tokenizer the template of `--chat-template`.

    Raises:
        ValueError: The data are messages, and there is no template.
    """
    if path is not None:
        if not data.conversational:
            raise ValueError(f"--chat-template: the data hold no messages ({data.kind} rows), so no template is used")
        tokenizer.chat_template = read_text(path).text
    elif data.conversational and not tokenizer.chat_template:
        raise ValueError("the data are messages, but the model's tokenizer has no chat template: choose a model that "
                         "was trained on chats, or give one by --chat-template FILE")  # fmt: skip
