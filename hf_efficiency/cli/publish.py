"""Write a report into a checkpoint folder, and upload the folder to the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from hf_efficiency.evaluation.card import FOLDER_PLACEHOLDER

if TYPE_CHECKING:
    from hf_efficiency.evaluation import Report

_PLOT = "report.png"


def write_report(report: Report, folder: Path) -> None:
    """report.json, report.png and README.md, each put in place whole."""
    for name, write in (
        ("report.json", report.to_json),
        (_PLOT, report.plot),
        ("README.md", report.to_card(plot=_PLOT).save),
    ):
        partial = folder / f".{name}.part"
        write(partial)
        os.replace(partial, folder / name)


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Create the repository if it is new, upload the folder in one commit, and return the repository's address.

    The card then names the repository as the place to load from, in the folder too.

    Raises:
        ValueError: the folder is no checkpoint and no adapter, or the name is no Hub id.
        OSError: the Hub refuses (no token, no right) or cannot be reached.
    """
    from huggingface_hub import HfApi

    adapter = (folder / "adapter_config.json").is_file()
    if not adapter and not (folder / "config.json").is_file():
        raise ValueError(f"the folder {str(folder)!r} is no checkpoint: it has no config.json")
    api = HfApi()
    repo_id = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
    readme = folder / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        readme.write_text(text.replace(FOLDER_PLACEHOLDER, repo_id), encoding="utf-8")
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=f"Upload {'an adapter trained' if adapter else 'a checkpoint compressed'} by hf_efficiency",
        ignore_patterns=["*.part"],
    )
    return str(commit.repo_url)
