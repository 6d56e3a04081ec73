"""Save a checkpoint folder so that it is either the old one or the new one, whole, whatever happens half-way."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a checkpoint folder may hold. Overwriting replaces the whole folder, so one that holds anything else is somebody
# else's, and stays.
_OWN_FILES = re.compile(
    r".*\.(safetensors|json|jinja|model|png)|README\.md|LICENSE.*|NOTICE.*|(merges|vocab)\.txt|\.gitattributes"
)


def check_output(out: str | Path, *, overwrite: bool = False) -> Path:
    """The folder `out` as a path, once it is sure that a checkpoint may be written there; call it before long work.

    Raises:
        ValueError: `out` is a file, is not empty and `overwrite` is off, or holds something that is no part of a
            checkpoint (then `overwrite` is refused too).
    """
    folder = Path(out).absolute()
    if not folder.exists():
        return folder
    if not folder.is_dir():
        raise ValueError(f"the output {str(out)!r} is a file; give a folder")
    entries = sorted(folder.iterdir())
    foreign = next((entry for entry in entries if entry.is_dir() or not _OWN_FILES.fullmatch(entry.name)), None)
    if foreign is not None:
        raise ValueError(
            f"the folder {str(out)!r} holds {foreign.name!r}, which is no part of a checkpoint: choose another folder"
        )
    if entries and not overwrite:
        raise ValueError(
            f"the folder {str(out)!r} is not empty: choose another one, or allow overwriting (--overwrite)"
        )
    return folder


@contextlib.contextmanager
def staged_folder(out: str | Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """An empty folder beside `out` that takes its place when the block ends without an error.

    On an error the staging folder is removed and an existing `out` is untouched; after a kill both are left, and the
    next call for the same `out` removes the leftover. The files are flushed to the disk before the swap. Where `out`
    exists it is renamed aside for the moment between the two renames.

    Args:
        out: the folder to make or replace.
        keep_existing: where `out` has come into being meanwhile, keep it and drop the new one (for caches that several
            processes may fill).
    """
    target = Path(out).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    staging, aside = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    try:
        staging.mkdir()
        yield staging
        _flush(staging)
        if keep_existing and target.exists():
            return
        if target.exists():
            target.rename(aside)
        try:
            staging.rename(target)
        except OSError:
            if aside.exists():
                aside.rename(target)
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: str | Path,
    extra_files: Mapping[str, str | bytes] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """`save_pretrained` of model and tokenizer into the folder `out`, with `extra_files` (name to content), atomically.

    A full disk, an error or a kill half-way leaves an existing `out` as it was.

    Raises:
        ValueError: `out` must not be written, see `check_output`.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    folder = check_output(out, overwrite=overwrite)
    with staged_folder(folder) as staging:
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        for name, content in (extra_files or {}).items():
            (staging / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def _flush(folder: Path) -> None:
    """Make the files' content reach the disk before the rename does."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_leftovers(target: Path) -> None:
    """Clear what killed processes left: their staging folders, and put back a folder that they had moved aside."""
    for leftover in target.parent.glob(f".{target.name}.*-*"):
        match = re.fullmatch(r"\.(.+)\.(new|old)-(\d+)", leftover.name)
        if match is None or match[1] != target.name or _is_running(int(match[3])):
            continue
        if match[2] == "old" and not target.exists():
            leftover.rename(target)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
