"""The interface between the calibration engine and a compression method.

Shape legend: b sequences of a micro-batch, t tokens, d hidden size, d_in, d_out features of a linear layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from hf_efficiency.calibration.structure import dense_parameters, is_conv1d, linear_sizes, set_weight_, weight_of

if TYPE_CHECKING:
    from hf_efficiency.quantization.layers.base import QuantizedLinear


@dataclass
class InputGroup:
    """Linear layers of one block that read the same tensor (query, key, value, for example), with its statistics.

    Attributes:
        names: Full module names.
        linears: The dense layers; read them with `weight_of`, change them with `set_weight_`.
        hessian: Mean of x xᵀ over the tokens, (d_in, d_in) float32, undamped.
        abs_mean: Mean of |x|, (d_in,), where the method asks for it.
        layers: The storage layers recorded so far in this block, by name.
        dtype: The model's own dtype, where the block's weights are held in a wider one; None where they are not.
    """

    names: list[str]
    linears: list[nn.Module]
    hessian: Tensor
    abs_mean: Tensor | None
    layers: dict[str, "QuantizedLinear"]
    dtype: torch.dtype | None = None

    def new_layer(self, method: "BlockMethod", name: str) -> "QuantizedLinear":
        """An empty storage layer of `method` for the member called `name`."""
        return layer_like(method, name, self.linears[self.names.index(name)], self.dtype)

    def store(self, name: str, layer: "QuantizedLinear") -> None:
        """Records the storage layer of `name`; the rest of the block goes on with its decoded weight.

        Raises:
            ValueError: If the decoded weight is not finite.
        """
        weight = check_finite(name, layer)
        self.layers[name] = layer
        set_weight_(self.linears[self.names.index(name)], weight)

    def weights(self) -> list[Tensor]:
        """The members' weights, each (d_out, d_in) float32."""
        return [weight_of(linear).float() for linear in self.linears]


def check_finite(name: str, layer: "QuantizedLinear") -> Tensor:
    """The decoded weight (d_out, d_in) of a storage layer that was just filled.

    Raises:
        ValueError: If it is not finite.
    """
    weight = layer.dequantize()
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{name}: the quantized weight is not finite. Its largest scale does not fit the format's float16; "
            "name the layer in `modules_to_not_convert`."
        )
    return weight


@dataclass
class BlockContext:
    """One decoder block while it is being compressed.

    Attributes:
        name: Full name of the block.
        index: Its place in the list.
        block: The module.
        inputs: Its inputs by micro-batch, (b, t, d): outputs of the compressed blocks before it.
        targets: The dense block's outputs on the dense model's hidden states, where the method keeps the dense stream.
        linears: The dense layers that may be compressed, by full name. Once a group is stored they hold its decoded
            weights.
        layers: The storage layers recorded so far, by full name.
        dtype: The model's own dtype, where the block's weights are held in a wider one; None where they are not.
        statistics_dtype: In which statistics multiply, float32 or bfloat16.
        call: Runs the block on other hidden states with the arguments of micro-batch i.
    """

    name: str
    index: int
    block: nn.Module
    inputs: list[Tensor]
    targets: list[Tensor] | None
    linears: dict[str, nn.Module]
    call: Callable[[nn.Module, Tensor, int], Tensor]
    layers: dict[str, "QuantizedLinear"] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    statistics_dtype: torch.dtype = torch.float32

    def run(self, x: Tensor, i: int) -> Tensor:
        """Output (b, t, d) of the block on hidden states x, with the masks and positions of micro-batch i."""
        return self.call(self.block, x, i)

    def refresh(self) -> None:
        """Writes the decoded weights and the biases of all stored layers into the dense ones, after they changed."""
        for name, layer in self.layers.items():
            set_weight_(self.linears[name], layer.dequantize())
            bias = dense_parameters(self.linears[name])[1]
            if bias is not None and layer.bias is not None:
                bias.data.copy_(layer.bias.detach())


class BlockMethod:
    """A compression method: block by block with statistics, or weight by weight. Subclasses are dataclasses."""

    statistics: ClassVar[frozenset[str]] = frozenset({"hessian"})
    # Whether layers later in a block see inputs that passed through the block's compressed earlier layers.
    true_sequential: bool = True

    @property
    def keep_dense(self) -> bool:
        """Whether the method needs the dense model's hidden states (`BlockContext.targets`)."""
        return False

    @property
    def refines(self) -> bool:
        """Whether `finish_block` changes anything, so that the block's outputs have to be computed again."""
        return False

    def start_block(self, ctx: BlockContext) -> None:
        """Called before anything runs through the block."""

    def compress_group(self, group: InputGroup) -> None:
        """Compresses the layers of one group and hands each result to `group.store`."""
        raise NotImplementedError

    def finish_block(self, ctx: BlockContext) -> None:
        """Called once all groups of the block are stored."""

    def empty_layer(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        compute_dtype: torch.dtype,
        device: torch.device | str | None,
        conv1d: bool,
    ) -> "QuantizedLinear":
        """The storage layer of one linear layer, with its tensors allocated but not filled."""
        raise NotImplementedError

    def quantize_weight(self, name: str, weight: Tensor, layer: "QuantizedLinear") -> None:
        """Data-free methods: quantizes `weight` (d_out, d_in) into the tensors of an empty `layer`."""
        raise NotImplementedError

    def validate(self) -> None:
        """ValueError for fields out of range, naming value, bound and cure."""

    def skips(self, name: str) -> bool:
        """Whether the method's own settings leave the layer called `name` dense."""
        return False


def layer_like(
    method: BlockMethod, name: str, linear: nn.Module, dtype: torch.dtype | None = None
) -> "QuantizedLinear":
    """An empty storage layer of `method` for a dense layer, with the dense layer's bias copied.

    It computes in `dtype`; None: in that of the dense layer.
    """
    in_features, out_features = linear_sizes(linear)
    weight, bias = dense_parameters(linear)
    layer = method.empty_layer(
        name,
        in_features,
        out_features,
        bias=bias is not None,
        compute_dtype=dtype or weight.dtype,
        device=weight.device,
        conv1d=is_conv1d(linear),
    )
    if bias is not None and layer.bias is not None:
        layer.bias.data.copy_(bias.detach())
    return layer
