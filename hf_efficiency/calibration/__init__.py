"""Calibration: data, statistics and the block-by-block engine that all one-shot methods share."""

from hf_efficiency.calibration.engine import run_blockwise
from hf_efficiency.calibration.method import BlockContext, BlockMethod, InputGroup

__all__ = ["BlockContext", "BlockMethod", "InputGroup", "run_blockwise"]
