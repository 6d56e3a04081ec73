"""A linear layer as adapters see it, and checks that hold for each of them."""

import torch
from torch.nn.functional import linear

from hf_efficiency.adapters.base import BaseLinear


def base_linear(weight, bias=None):
    return BaseLinear(lambda: weight, bias, weight.shape[1], weight.shape[0])


def random_base(d_in, d_out, *, bias=True, seed=0):
    """In float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    return base_linear(weight, torch.randn(d_out, generator=generator, dtype=torch.float64) if bias else None)


def randomize(adapter, seed=1):
    """Moves every parameter away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)


def adapted(adapter, x, base):
    """The adapted layer's output."""
    output = linear(x, base.weight(), base.bias)
    return output + adapter(x, output, base)


def check_gradients(adapter, base):
    """Of the output with respect to the input and all parameters, in float64 by finite differences."""
    x = torch.randn(2, base.in_features, dtype=torch.float64, requires_grad=True)

    def output(x, *parameters):
        return adapted(adapter, x, base)

    assert torch.autograd.gradcheck(output, (x, *adapter.parameters()))


def check_merging(adapter, base):
    """The merged weight computes what the adapted layer does, and can be taken apart again."""
    x = torch.randn(3, base.in_features, dtype=torch.float64)
    weight = base.weight()
    merged = adapter.merged_weight(weight)
    torch.testing.assert_close(linear(x, merged, base.bias), adapted(adapter, x, base))
    torch.testing.assert_close(adapter.unmerged_weight(merged), weight)
