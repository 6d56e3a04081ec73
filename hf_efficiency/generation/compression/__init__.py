"""Shorter prompts: what of a prompt stays, counted in tokens, and how an answer finds its way back."""

from hf_efficiency.generation.compression.result import Compressed
from hf_efficiency.generation.compression.segments import Segment

__all__ = ["Compressed", "Segment"]
