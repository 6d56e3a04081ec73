"""Finds the folders that are packed inside the package in a wheel but lie beside it in a checkout."""

import re
from pathlib import Path

_OUR_PROJECT = re.compile(r'^name = "hf_efficiency"$', re.MULTILINE)


def checkout_paths(pattern: str) -> list[str]:
    """Folders of this project's checkout that match a glob, to be appended to a package's ``__path__``.

    Args:
        pattern: glob relative to the root of the checkout, such as ``"kernels/*/torch-ext"``.

    Returns:
        Absolute paths, sorted; empty where the package was installed from a wheel. The ``pyproject.toml`` beside the
        package must be this project's own: ``pip install --target .`` puts a wheel beside somebody else's.
    """
    root = Path(__file__).resolve().parent.parent
    project = root / "pyproject.toml"
    if not project.is_file() or not _OUR_PROJECT.search(project.read_text(encoding="utf-8")):
        return []
    return sorted(str(path) for path in root.glob(pattern) if path.is_dir())
