"""Choosing, cleaning, ordering and mixing training data: one file a method, and `select` in front of them."""

from hf_efficiency.selection.selecting import Selection, select
from hf_efficiency.selection.strategies import STRATEGIES, Strategy

__all__ = ["STRATEGIES", "Selection", "Strategy", "select"]
