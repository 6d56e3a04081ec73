"""Shorter prompts with models of `transformers`: `compress_prompt`, the token classifier and gist tokens."""

from hf_efficiency.integrations.transformers.compression.gist import GistModel
from hf_efficiency.integrations.transformers.compression.prompt import METHODS, compress_prompt

__all__ = ["METHODS", "GistModel", "compress_prompt"]
