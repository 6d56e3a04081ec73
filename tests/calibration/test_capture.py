"""How a model calls its blocks is seen without running them."""

import pytest
import torch

from hf_efficiency.calibration import structure
from hf_efficiency.calibration.capture import same_calls, trace, trace_calls
from hf_efficiency.calibration.structure import find_blocks
from tests.families import FAMILIES, build_family


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_are_those_of_a_full_pass(family):
    model = build_family(family)
    _, blocks = find_blocks(model)
    tokens = torch.arange(3, 3 + 2 * 12).view(2, 12)
    seen = trace(model, blocks, tokens)
    calls = trace_calls(model, blocks, tokens.flip(1), seen.returns)
    assert len(calls) == len(blocks)
    assert same_calls(calls, seen.calls)
    assert all("forward" not in vars(block) for block in blocks)


def test_layers_are_known_while_a_model_is_made_on_the_meta_device():
    module = build_family("falcon")
    layer = next(m for m in module.modules() if type(m).__name__ == "FalconLinear")
    structure._only_writes_product.cache_clear()
    with torch.device("meta"):
        assert structure.is_linear(layer)
