"""What is said of targets that name nothing."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def no_match(targets: str | Iterable[str], names: Iterable[str], kind: str = "layer") -> str:
    """The message for `target_modules` that match none of the layers called `names`: near misses, or what there is."""
    known = sorted({name.rpartition(".")[2] for name in names})
    wanted = [targets] if isinstance(targets, str) else sorted(targets)
    near = sorted({hit for want in wanted for hit in difflib.get_close_matches(want.rpartition(".")[2], known)})
    hint = f"Did you mean {', '.join(near)}?" if near else f"Its linear layers are called {', '.join(known)}."
    return f"target_modules={targets!r} match no {kind} of the model. {hint}"
