"""`hf-efficiency push DIR REPO`: upload a checkpoint folder with its card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_efficiency.cli.publish import upload

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    print(f"Uploaded to {upload(Path(args.folder), args.repo, private=args.private)}")
    return 0
