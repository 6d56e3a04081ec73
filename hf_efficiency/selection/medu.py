"""MEDU: a model estimates how useful a text is for a task.

Held et al., "Optimizing Pretraining Data Mixtures with LLM-Estimated Utility" (2025), section 4: the model reads what a
task asks for and a document, and grades it from Great to Useless. Here the grade is the mean over the grades, weighted
by the probability that the model gives to each, so that one forward pass is enough and nothing is parsed. Shape legend:
b texts, g grades.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_efficiency.selection.signals import scoring

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import nn

GRADES = ("Great", "Good", "Okay", "Poor", "Useless")
PROMPT = """A language model is being trained for this: {task}

Document:
{text}

How useful is the document for that training: Great, Good, Okay, Poor or Useless?
Answer:"""


@dataclass(frozen=True)
class MEDU:
    """Settings.

    Attributes:
        task: What the model is to be good at, in a sentence or two; a description of a benchmark, say.
        prompt: Holds `{task}` and `{text}` and ends where the grade follows.
        grades: From best to worst; utilities fall evenly from 1 to 0.
        max_characters: Of the document.
    """

    task: str
    prompt: str = PROMPT
    grades: tuple[str, ...] = GRADES
    max_characters: int = 2000

    def __post_init__(self) -> None:
        if not self.task.strip():
            raise ValueError("task is empty: describe what the model is to be good at.")
        missing = [name for name in ("{task}", "{text}") if name not in self.prompt]
        if missing:
            raise ValueError(f"the prompt lacks {' and '.join(missing)}.")
        if len(self.grades) < 2:
            raise ValueError(f"grades={self.grades} must be at least two, from best to worst.")

    def grade_tokens(self, tokenizer: Any) -> list[int]:
        """The first token of each grade after the prompt.

        Raises:
            ValueError: two grades begin with the same token.
        """
        firsts = [tokenizer(f" {grade}", add_special_tokens=False)["input_ids"] for grade in self.grades]
        tokens = [ids[0] for ids in firsts]
        if len(set(tokens)) < len(tokens):
            raise ValueError(f"the grades {self.grades} begin with the same token: choose other words.")
        return tokens

    def score(self, texts: Sequence[str], model: nn.Module, tokenizer: Any) -> NDArray[np.float32]:
        """Expected utility of each text in [0, 1], (b,)."""
        tokens = self.grade_tokens(tokenizer)
        utility = torch.linspace(1, 0, len(tokens))
        device = next(model.parameters()).device
        scores = np.empty(len(texts), np.float32)
        with scoring(model):
            for i, text in enumerate(texts):
                prompt = self.prompt.replace("{task}", self.task).replace("{text}", text[: self.max_characters])
                ids = torch.tensor([tokenizer(prompt, verbose=False)["input_ids"]], device=device)
                logits = model(input_ids=ids).logits[0, -1, tokens].float().cpu()
                scores[i] = float(logits.softmax(0) @ utility)
        return scores
