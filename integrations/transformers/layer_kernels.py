"""Our layer kernels in transformers' own table, which `from_pretrained(..., use_kernels=True)` takes them from."""

from collections.abc import Iterable

from torch import nn

from hf_efficiency.integrations.kernels_hub import layer_mapping, open_gated_mlps
from transformers.integrations.hub_kernels import get_kernel_mapping_transformers


def register_layer_kernels(*mlp_classes: type[nn.Module], backends: Iterable[str] = ("cuda", "rocm")) -> None:
    """From now on `use_kernels=True` puts our RMSNorm and gated MLP into models, in place of the Hub's.

    Args:
        *mlp_classes: Gated MLP classes to replace as well, `LlamaMLP` for example: transformers leaves these closed.
        backends: Types of devices for which ours are taken.
    """
    open_gated_mlps(*mlp_classes)
    table = get_kernel_mapping_transformers()
    for name, devices in layer_mapping(backends).items():
        table.setdefault(name, {}).update(devices)
