"""Blocks run in the dtype that the CPU multiplies fastest, and nothing of that stays behind."""

import pytest
import torch
from torch import nn

from hf_efficiency.calibration import engine, precision
from hf_efficiency.calibration.engine import run_blockwise
from hf_efficiency.quantization.awq import AWQ
from hf_efficiency.quantization.gptq import GPTQ


@pytest.mark.parametrize(("wide", "half", "expected"), [(3.0, 1.0, torch.float32), (1.1, 1.0, torch.bfloat16)])
def test_float32_only_where_it_is_clearly_faster(wide, half, expected, monkeypatch):
    monkeypatch.setattr(precision, "_rate", {torch.float32: wide, torch.bfloat16: half}.get)
    assert precision.working_dtype(torch.bfloat16, torch.device("cpu")) == expected
    assert precision.working_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16


def test_float32_models_stay_as_they_are():
    assert precision.working_dtype(torch.float32, torch.device("cpu")) == torch.float32


def test_widened_gives_every_tensor_its_dtype_back():
    block = nn.Sequential(nn.Linear(3, 3, dtype=torch.bfloat16), nn.LayerNorm(3))
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    with precision.widened(block, torch.float32):
        assert {p.dtype for p in block.parameters()} == {torch.float32}
    after = dict(block.named_parameters())
    assert all(after[name].dtype == p.dtype and torch.equal(after[name], p) for name, p in before.items())


@pytest.mark.parametrize("sequential", [True, False])
def test_result_is_as_if_run_in_the_models_own_dtype(tiny_llama, tiny_tokens, sequential, monkeypatch):
    """The layers compute in the model's dtype, and nearly all codes are those of a float32 run of the same weights."""
    model = tiny_llama.bfloat16()
    exact = type(model)(model.config).float()
    exact.load_state_dict({name: p.float() for name, p in model.state_dict().items()})
    method = GPTQ(bits=4, group_size=32, true_sequential=sequential)
    wanted = run_blockwise(exact, tiny_tokens, method, progress=False)
    monkeypatch.setattr(engine, "working_dtype", lambda dtype, device: torch.float32)
    found = run_blockwise(model, tiny_tokens, method, progress=False)
    assert {layer.compute_dtype for layer in found.values()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    first = next(iter(wanted))
    assert (found[first].unpack().codes == wanted[first].unpack().codes).float().mean() > 0.97


def test_wide_products_are_rounded_once():
    """Between layers everything keeps its dtype; inside a layer the product is that of float32."""
    block = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)).bfloat16()
    x, weight = torch.randn(3, 5).bfloat16(), block[0].weight.detach().clone()
    seen = []
    block[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with precision.wide_products(block, torch.float32):
        assert block[0].weight.dtype == torch.float32
        assert block(x).dtype == torch.bfloat16
    wanted = nn.functional.linear(x.float(), weight.float(), block[0].bias.float()).bfloat16()
    assert torch.equal(seen[0], wanted)
    assert torch.equal(block[0].weight, weight)
    assert block[0].weight.dtype == torch.bfloat16
    block(x)  # no hook is left that would cast the input


def test_wide_products_follow_their_input():
    """A caller who runs the block in float32 (AWQ's trials) gets float32."""
    block = nn.Sequential(nn.Linear(5, 4)).bfloat16()
    with precision.wide_products(block, torch.float32):
        assert block(torch.randn(3, 5)).dtype == torch.float32


def test_awq_where_products_are_widened(tiny_llama, tiny_tokens, monkeypatch):
    monkeypatch.setattr(engine, "working_dtype", lambda dtype, device: torch.float32)
    layers = run_blockwise(tiny_llama.bfloat16(), tiny_tokens, AWQ(bits=4, group_size=32), progress=False)
    assert {layer.compute_dtype for layer in layers.values()} == {torch.bfloat16}
