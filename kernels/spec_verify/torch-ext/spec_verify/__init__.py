"""Exact acceptance of drafted tokens in speculative decoding, for chains and trees, a whole batch at once."""

from . import layers
from .op import verify_chain, verify_chain_greedy, verify_chain_logits, verify_tree, verify_tree_greedy

__all__ = [
    "layers",
    "verify_chain",
    "verify_chain_greedy",
    "verify_chain_logits",
    "verify_tree",
    "verify_tree_greedy",
]
