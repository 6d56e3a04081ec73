"""A model and a tokenizer so small that every number can be worked out by hand."""

from types import SimpleNamespace

import torch
from torch import nn


class TableModel(nn.Module):
    """Each token's logits are a row of a table (V, V), whatever came before."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(table))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=16))

    @property
    def device(self):
        return self.table.device

    def forward(self, input_ids, use_cache):
        assert not self.training
        assert not torch.is_grad_enabled()
        return SimpleNamespace(logits=self.table[input_ids])


class DigitTokenizer:
    """'0210' -> [0, 2, 1, 0]; counts how often it is asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, text, verbose=True):
        self.calls += 1
        return {"input_ids": [int(c) for c in text if c.isdigit()]}
