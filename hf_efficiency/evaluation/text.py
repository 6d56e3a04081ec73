"""The text that a model is measured on, and how it is cut into windows.

The default text needs no network and shares nothing with the default calibration text: calibration reads Python's
language reference (`pydoc_data.topics`), evaluation reads prose paragraphs of the docstrings of the standard library.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# Modules of every CPython from 3.11 on whose docstrings hold real sentences. `pdb` and `str` are left out on purpose:
# their documentation is part of pydoc_data.topics.
_MODULES = (
    "_pydecimal", "_pyio", "argparse", "asyncio.tasks", "base64", "bdb", "calendar", "collections", "configparser",
    "csv", "datetime", "difflib", "doctest", "email.header", "email.message", "ftplib", "http.client",
    "http.cookiejar", "http.server", "imaplib", "inspect", "ipaddress", "logging", "logging.config",
    "logging.handlers", "mimetypes", "optparse", "pathlib", "pickle", "pickletools", "pkgutil", "platform", "queue",
    "random", "re", "sched", "shutil", "smtplib", "socketserver", "ssl", "statistics", "subprocess", "tarfile",
    "tempfile", "textwrap", "threading", "timeit", "tokenize", "traceback", "turtle", "typing", "unittest.case",
    "unittest.mock", "urllib.parse", "urllib.request", "uuid", "weakref",
)  # fmt: skip
_MIN_WORDS = 25
_MARKUP = re.compile(r">>>|[=|`*{}\[\]\\_]")


@dataclass(frozen=True)
class EvaluationText:
    """A text with the one-line description that reports and model cards print beside the numbers."""

    text: str
    description: str


def default_text() -> EvaluationText:
    """Prose from the docstrings of Python's standard library, about 130 kB; the same on every run of one Python.

    Only paragraphs of at least 25 words are kept, without code or tables, and none that shares a run of eight words
    with the default calibration text. Two Python versions give slightly different
    texts, so the description carries the version and a hash: numbers compare only where both agree.

    Raises:
        ValueError: the standard library's source files are not installed.
    """
    seen = {run for topic in topics.values() for run in _word_runs(topic)}
    prose = (paragraph for module in _MODULES for paragraph in _prose(module))
    text = "\n\n".join(paragraph for paragraph in prose if seen.isdisjoint(_word_runs(paragraph)))
    if not text:
        raise ValueError(
            "the default evaluation text is read from the standard library's source files, and this Python has none "
            "(or only compiled files): pass a text file instead (--eval-text FILE)"
        )
    name = f"docstring prose of the standard library, Python {platform.python_version()}"
    return EvaluationText(text, f"{name}, {_size_and_hash(text)}")


def read_text(path: str | Path) -> EvaluationText:
    """The UTF-8 text file `path`, whole.

    Raises:
        ValueError: the file is missing, empty or not UTF-8 text.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read the text file {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise ValueError(f"the text file {str(path)!r} is empty")
    return EvaluationText(text, f"{path.name}, {_size_and_hash(text)}")


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: str | Sequence[str], window: int, max_windows: int | None
) -> Tensor:
    """Tokenize `text` once and cut it into non-overlapping windows.

    A list of strings is joined by a blank line. The tokenizer adds its own special tokens once, at the ends of the
    whole text; a last piece shorter than `window` is dropped.

    Returns:
        LongTensor (n, window) with n <= max_windows.

    Raises:
        TypeError: `text` is neither a string nor strings.
        ValueError: `window` or `max_windows` is out of range, or the text is shorter than one window.
    """
    if window < 2:
        raise ValueError(f"window is {window}, but a window needs at least 2 tokens: one to read and one to predict")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows is {max_windows}; it must be at least 1, or None for the whole text")
    ids = tokenizer(join_text(text), verbose=False)["input_ids"]
    count = len(ids) // window
    if count == 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than one window of {window}: give a longer text or a smaller window"
        )
    count = min(count, max_windows or count)
    return torch.tensor(ids[: count * window], dtype=torch.long).view(count, window)


def join_text(text: str | Sequence[str]) -> str:
    """`text` itself, or its parts joined by a blank line.

    Raises:
        TypeError: it holds something else than strings.
    """
    parts = [text] if isinstance(text, str) else list(text)
    wrong = next((part for part in parts if not isinstance(part, str)), None)
    if wrong is not None:
        raise TypeError(f"text must be a string or strings, but it holds a {type(wrong).__name__}")
    return "\n\n".join(parts)


def _size_and_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{len(text):,} characters, sha256 {digest}"


def shared_runs(text: str, other: str) -> float:
    """Share of the runs of eight words in `text` that occur in `other` too, 0 to 1; 0 for a text of fewer words."""
    known = set(_word_runs(other))
    found = [run in known for run in _word_runs(text)]
    return sum(found) / len(found) if found else 0.0


def _word_runs(text: str, length: int = 8) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def _prose(module: str) -> Iterator[str]:
    """The prose paragraphs in the docstrings of `module`, in the order of the source; nothing if it has no source."""
    spec = importlib.util.find_spec(module)
    loader = spec.loader if spec else None
    source = loader.get_source(module) if loader is not None and hasattr(loader, "get_source") else None
    if source is None:
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
            words = paragraph.split()
            if len(words) < _MIN_WORDS or _MARKUP.search(paragraph):
                continue
            if words[0][0].isupper() and words[-1][-1] in ".:":
                yield " ".join(words)
