"""`GistModel`: k learned tokens whose keys and values stand for a prompt (Mu, Li & Goodman 2023).

Shape legend: p prompt tokens, k gist tokens, n tokens after them, d hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hf_efficiency.generation.caches.slots import additive
from hf_efficiency.generation.compression.gist import gist_mask
from hf_efficiency.saving import staged_folder
from transformers import DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHTS, _CONFIG = "gist.safetensors", "gist_config.json"


@dataclass
class Gist:
    """A prompt as the keys and values of k tokens, and the position that comes next."""

    cache: DynamicCache
    position: int


class GistModel(nn.Module):
    """Trains and uses `num_tokens` gist tokens of a causal model whose own weights stay.

    Only the gist embeddings (k, d) are learned; where the model carries an adapter with trainable weights, `fit` trains
    that too (the caller saves it).

    Args:
        model: A causal language model with full attention in every layer.
        num_tokens: k.

    Raises:
        ValueError: `num_tokens` is below 1.
    """

    def __init__(self, model: PreTrainedModel, num_tokens: int) -> None:
        super().__init__()
        if num_tokens < 1:
            raise ValueError(f"num_tokens is {num_tokens}; it must be at least 1")
        self.model = model
        table = _embedding(model).weight.detach().float()
        start = table.mean(0) + 0.02 * torch.randn(num_tokens, table.shape[1], device=table.device)
        self.embeddings = nn.Parameter(start)

    def forward(self, prompt: Tensor, rest: Tensor) -> Tensor:
        """Logits (n, vocabulary) of the tokens after the gist.

        Args:
            prompt: Ids (p).
            rest: Ids (n).
        """
        embed = _embedding(self.model)
        inputs = torch.cat((embed(prompt), self.embeddings.to(embed.weight.dtype), embed(rest)))[None]
        seen = gist_mask(len(prompt), len(self.embeddings), len(rest), inputs.device)
        mask = additive(seen[None, None], inputs.dtype)
        return self.model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits[0, -len(rest) :]

    def fit(
        self, pairs: Iterable[tuple[Tensor, Tensor]], *, epochs: int = 1, learning_rate: float = 1e-2
    ) -> list[float]:
        """Trains on pairs of a prompt's ids (p) and what follows (n >= 2); the mean loss of each epoch.

        Raises:
            ValueError: There are no pairs, or one has fewer than two tokens after the prompt.
        """
        rows = list(pairs)
        if not rows or any(len(rest) < 2 for _, rest in rows):
            raise ValueError("give at least one pair, each with two tokens or more after its prompt")
        own = [p for name, p in self.named_parameters() if name == "embeddings" or "lora_" in name]
        frozen = {p: p.requires_grad for p in self.parameters()}
        losses = []
        try:
            for p in frozen:
                p.requires_grad_(any(p is q for q in own))
            optimizer = torch.optim.Adam(own, lr=learning_rate)
            for _ in range(epochs):
                total = 0.0
                for prompt, rest in rows:
                    loss = F.cross_entropy(self(prompt, rest)[:-1].float(), rest[1:])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total += float(loss.detach())
                losses.append(total / len(rows))
        finally:
            for p, flag in frozen.items():
                p.requires_grad_(flag)
        return losses

    @torch.no_grad()
    def compress(self, prompt: Tensor) -> Gist:
        """The gist of a prompt's ids (p): keys and values of k tokens."""
        embed = _embedding(self.model)
        inputs = torch.cat((embed(prompt), self.embeddings.to(embed.weight.dtype)))[None]
        full = DynamicCache()
        self.model(inputs_embeds=inputs, past_key_values=full, use_cache=True, logits_to_keep=1)
        k, short = len(self.embeddings), DynamicCache()
        layers: list[Any] = full.layers
        for index, layer in enumerate(layers):
            short.update(layer.keys[:, :, -k:].clone(), layer.values[:, :, -k:].clone(), index)
        return Gist(short, inputs.shape[1])

    @torch.no_grad()
    def logits(self, gist: Gist, ids: Tensor) -> Tensor:
        """Logits (n, vocabulary) of ids (n) after a gist, whose cache then holds them too."""
        positions = torch.arange(gist.position, gist.position + len(ids), device=ids.device)[None]
        out = self.model(ids[None], past_key_values=gist.cache, position_ids=positions, use_cache=True)
        gist.position += len(ids)
        return out.logits[0]

    @torch.no_grad()
    def generate(self, gist: Gist, ids: Tensor, max_new_tokens: int, eos_token_id: int | None = None) -> Tensor:
        """Greedy continuation (at most `max_new_tokens`) of ids (n) after a gist."""
        found: list[Tensor] = []
        step = ids
        for _ in range(max_new_tokens):
            step = self.logits(gist, step)[-1:].argmax(-1)
            found.append(step)
            if eos_token_id is not None and int(step) == eos_token_id:
                break
        return torch.cat(found) if found else ids[:0]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the gist tokens as a small adapter folder."""
        size, width = self.embeddings.shape
        with staged_folder(folder) as staging:
            save_file({"embeddings": self.embeddings.detach().cpu().contiguous()}, staging / _WEIGHTS)
            (staging / _CONFIG).write_text(json.dumps({"num_tokens": size, "hidden_size": width}, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, model: PreTrainedModel, folder: str | Path) -> GistModel:
        """The gist tokens of a folder, on the model that they were trained for.

        Raises:
            ValueError: The folder holds none, or they are of another width.
        """
        path = Path(folder)
        if not (path / _CONFIG).is_file():
            raise ValueError(f"{str(folder)!r} holds no gist tokens: it has no {_CONFIG}")
        config: dict[str, Any] = json.loads((path / _CONFIG).read_text())
        width = _embedding(model).weight.shape[1]
        if config["hidden_size"] != width:
            raise ValueError(
                f"the gist tokens in {str(folder)!r} have {config['hidden_size']} numbers each, but the model's "
                f"embeddings have {width}: load them on the model that they were trained for"
            )
        made = cls(model, config["num_tokens"])
        made.embeddings.data.copy_(load_file(path / _WEIGHTS)["embeddings"])
        return made


def _embedding(model: PreTrainedModel) -> Any:
    return model.get_input_embeddings()
