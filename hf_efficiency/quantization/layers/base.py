"""What every storage layer shares: declared tensors, one dequantize, a forward with a gradient to its input.

Shape legend: n rows of activations, d_in input features, d_out output features.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficiency.kernels.decoder_layers._launch import enabled

# A dense block of this many elements is what the blocked forward holds at most beside the packed weight.
BLOCK_ELEMENTS = 1 << 24

TensorSpec = dict[str, tuple[tuple[int, ...], torch.dtype]]


def default_kernel_devices() -> frozenset[str]:
    """Types of devices where Triton kernels multiply: GPUs; none where the environment says so or Triton is missing."""
    return frozenset({"cuda"} if enabled() else ())


class _RecomputedLinear(torch.autograd.Function):
    """x Wᵀ whose backward decodes W again, so that the graph keeps no dense weight alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "QuantizedLinear") -> Tensor:
        ctx.layer = layer
        return layer.matmul(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.layer.dequantize().to(grad.dtype), None


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is stored in packed form.

    It derives from `nn.Linear` because PEFT and others dispatch on that class; it has no dense `weight` parameter.
    `W_q`, `dequantize()` and `compute_dtype` are what PEFT asks a quantized layer for.

    Args:
        in_features: d_in.
        out_features: d_out.
        bias: Whether the layer adds a bias (d_out,), kept in `compute_dtype`.
        compute_dtype: Floating dtype of `dequantize()`, of the bias, and of the adapters that PEFT adds.
        device: Where the tensors are made (`"meta"` while a checkpoint is being loaded).
        conv1d: The layer stands for a `transformers` `Conv1D`, whose dense weight is stored as (d_in, d_out).

    Attributes:
        kernel_devices: Types of devices where the format's Triton kernel runs. The empty set turns it off;
            `HF_EFFICIENCY_KERNELS=reference` in the environment does so for all layers made afterwards.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        conv1d: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = compute_dtype
        self.conv1d = conv1d
        self.kernel_devices = default_kernel_devices()
        # transformers initializes every nn.Linear that it did not mark as loaded, and would look for a dense weight.
        self._is_hf_initialized = True
        for name, (shape, dtype) in self.declare().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=compute_dtype, device=device), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @abstractmethod
    def declare(self) -> TensorSpec:
        """Name, shape and dtype of each tensor that this layer stores, the packed weight first."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The weight (d_out, d_in) in `compute_dtype`."""

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the weight, (stop - start, d_in), in `compute_dtype`."""
        return self.dequantize()[start:stop]

    def prepare(self) -> None:
        """Builds what the fast forward of this device needs. Called once after loading; may do nothing."""

    @property
    def W_q(self) -> Tensor:
        """The packed weight, by the name under which PEFT recognizes a quantized layer."""
        return self.get_buffer(next(iter(self.declare())))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # nn.Linear has a parameter of this name
        """The packed weight, or the dense one that is still to be quantized. PEFT looks at its type and device.

        It is no decoded weight on purpose: adding to that would be lost in silence, adding to packed codes fails.
        """
        tensor: Tensor | None = self._parameters.get("weight")
        if tensor is None:
            tensor = self._buffers.get(next(iter(self.declare())))
        if tensor is None:  # what nn.Module says, so that hasattr() works
            raise AttributeError(f"{type(self).__name__} has no weight yet")
        return tensor

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ for x (n, d_in), without the bias. Decodes at most `BLOCK_ELEMENTS` weights at a time."""
        rows = max(1, BLOCK_ELEMENTS // self.in_features)
        if self.out_features <= rows:
            return x @ self.dequantize().to(x.dtype).T
        starts = range(0, self.out_features, rows)
        blocks = [x @ self.dequantize_rows(i, min(i + rows, self.out_features)).to(x.dtype).T for i in starts]
        return torch.cat(blocks, dim=-1)

    def kernel_forward(self, x: Tensor) -> Tensor | None:
        """x Wᵀ plus the bias for x (n, d_in), by the format's Triton kernel, with a gradient to x.

        None where there is no kernel for this layer's settings.
        """
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to x (..., d_in) and returns (..., d_out) in the dtype of x."""
        flat = x.reshape(-1, self.in_features)
        if x.device.type in self.kernel_devices:
            fast = self.kernel_forward(flat)
            if fast is not None:
                return fast.view(*x.shape[:-1], self.out_features)
        if flat.requires_grad and torch.is_grad_enabled():
            y = _RecomputedLinear.apply(flat, self)
        else:
            y = self.matmul(flat)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        # `model.to(torch.bfloat16)` moves what is computed, not what is stored: scales and tables keep their dtype.
        stored = {name: getattr(self, name) for name in self.declare()}
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=self.W_q.device))
        super()._apply(fn, recurse)
        for name, old in stored.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        if probe.is_floating_point():
            self.compute_dtype = probe.dtype
        return self

    def extra_repr(self) -> str:
        """The layer's sizes, for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, compute_dtype={self.compute_dtype}"
        )
