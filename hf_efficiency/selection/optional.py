"""Libraries that only some strategies need, imported when they do."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, purpose: str) -> Any:
    """The module, or an ImportError that says how to get it.

    Args:
        module: Its name, such as `sklearn.cluster`.
        purpose: What needs it, as the subject of "needs".
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {module.split('.')[0]!r}, which is not installed: pip install 'hf_efficiency[data]'"
        ) from error
