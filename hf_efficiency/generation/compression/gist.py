"""The attention mask of gist tokens (Mu, Li & Goodman 2023, "Learning to Compress Prompts with Gist Tokens").

Shape legend: p prompt tokens, k gist tokens, n tokens after them, t = p + k + n.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gist_mask(prompt: int, gist: int, rest: int, device: torch.device | str = "cpu") -> Tensor:
    """Who sees whom (t, t): causal, but what comes after the gist tokens sees of the prompt only them.

    Raises:
        ValueError: There is no gist token.
    """
    if gist < 1:
        raise ValueError(f"the number of gist tokens is {gist}; it must be at least 1")
    total = prompt + gist + rest
    mask = torch.ones(total, total, dtype=torch.bool, device=device).tril()
    mask[prompt + gist :, :prompt] = False
    return mask
