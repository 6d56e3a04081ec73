"""Speculative decoding: drafts, trees, acceptance, and how much to draft.

Plain torch; the loop lies in the integration.
"""

from hf_efficiency.generation.speculative.adapt import DraftControl
from hf_efficiency.generation.speculative.draft import Draft, Drafter, Scorer
from hf_efficiency.generation.speculative.lookup import LookupDrafter
from hf_efficiency.generation.speculative.statistics import SpeculativeStatistics
from hf_efficiency.generation.speculative.tree import MOST_NODES, TreeShape, check_shape
from hf_efficiency.generation.speculative.verify import verify

__all__ = [
    "MOST_NODES",
    "Draft",
    "DraftControl",
    "Drafter",
    "LookupDrafter",
    "Scorer",
    "SpeculativeStatistics",
    "TreeShape",
    "check_shape",
    "verify",
]
