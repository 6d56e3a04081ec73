"""Runs a function once another package has been imported, without importing it now."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class _Waiting:
    """Lets the other finders find `package`, and adds a call to the end of its import."""

    def __init__(self, package: str, action: Callable[[], None]) -> None:
        self.package, self.action = package, action

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of `package` as the other finders give it."""
        if name != self.package:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute, action = spec.loader.exec_module, self.action

            def exec_module(module: ModuleType) -> None:
                execute(module)
                action()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def after_import(package: str, action: Callable[[], None]) -> None:
    """Calls `action` when `package` (a top-level name) has been imported: now, or at the end of its first import.

    A package that is not installed, or never imported, costs nothing.
    """
    if package in sys.modules:
        action()
    elif not any(isinstance(finder, _Waiting) and finder.package == package for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(package, action))
