"""What tests of adapters need without a host library."""

import torch

from hf_efficiency.adapters.base import BaseLinear


def base_of(d_out, d_in):
    """A layer without a bias, in float32."""
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0))
    return BaseLinear(lambda: weight, None, d_in, d_out)


def randomized(adapter, seed=0):
    """The adapter in float64 with all its parameters drawn anew, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return adapter


def count(adapter):
    """Trained numbers."""
    return sum(parameter.numel() for parameter in adapter.parameters())


def gradcheck(adapter, x, output=None):
    """Compares the gradients to input and parameters with finite differences, in float64."""
    names, values = zip(*adapter.named_parameters(), strict=True)

    def run(x, *values):
        arguments = (x, x if output is None else output, None)
        return torch.func.functional_call(adapter, dict(zip(names, values, strict=True)), arguments)

    inputs = [x.double().requires_grad_(), *(value.detach().clone().requires_grad_() for value in values)]
    return torch.autograd.gradcheck(run, inputs)
