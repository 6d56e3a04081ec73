"""A model's output head, taken out of its forward pass so that logits can be made for a few tokens at a time.

Shape legend: n rows (tokens), c rows of a chunk, V vocabulary, d features.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# What models do to the logits after the head, by the key of the config that holds the number.
_AFTER: dict[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda z, cap: cap * torch.tanh(z / cap),  # Gemma 2
    "logit_scale": lambda z, scale: z * scale,  # Cohere
    "logits_scaling": lambda z, scale: z / scale,  # Granite
    "lm_head_multiplier": lambda z, scale: z * scale,  # Falcon-H1
}


class OutputHead:
    """From hidden states to logits, as the model itself would.

    Args:
        model: A causal language model, or a PEFT model around one.

    Raises:
        ValueError: The model has no output embeddings.
    """

    def __init__(self, model: Any) -> None:
        module = model.get_output_embeddings()
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"{type(model).__name__} has no output embeddings, so it gives no next-token distribution: distil "
                "from and to causal language models (AutoModelForCausalLM)."
            )
        self.module = module
        config = model.config.get_text_config()
        found = [(after, getattr(config, key, None)) for key, after in _AFTER.items()]
        self.after = [(after, float(value)) for after, value in found if isinstance(value, (int, float))]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., d)."""
        logits: Tensor = self.module(hidden)
        for after, value in self.after:
            logits = after(logits, value)
        return logits

    @property
    def size(self) -> int:
        """V: logits of a token."""
        weight: Any = self.module.weight
        return int(getattr(self.module, "out_features", None) or weight.shape[0])

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def linear(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight (V, d) and bias (V,) if the head is a plain product and nothing follows it."""
        module = self.module
        if type(module) is not nn.Linear or self.after or module.weight.is_meta:
            return None
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return None
        return module.weight, module.bias

    def agrees(self, hidden: Tensor, logits: Tensor) -> bool:
        """Whether this gives the logits (..., V) that the model itself gave for hidden (..., d)."""
        if any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in self.module.modules()):
            return True  # two passes differ by design
        with torch.no_grad():
            ours = self(hidden).float()
        return ours.shape == logits.shape and torch.allclose(ours, logits.float(), rtol=1e-2, atol=1e-2)


class LogitsHead(OutputHead):
    """Stands for the head where the logits are there already: its input is its output."""

    def __init__(self) -> None:
        self.module, self.after = nn.Identity(), []


class LinearPass:
    """The products of a plain head, forward and backward, in buffers that are used again for each chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab: int, *, gradient: bool) -> None:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        self.hidden, self.weight = hidden.detach().to(dtype), weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach()
        self.vocab = vocab
        # Sums over chunks are kept at least in float32, but on a GPU, where a head in half precision is large.
        wide = weight.dtype if hidden.is_cuda else torch.promote_types(weight.dtype, torch.float32)
        trained = [gradient and t is not None and t.requires_grad for t in (hidden, weight, bias)]
        self._hidden = torch.empty_like(hidden) if trained[0] else None
        self._weight = weight.new_zeros(weight.shape, dtype=wide) if trained[1] else None
        self._bias = bias.new_zeros(bias.shape, dtype=wide) if trained[2] and bias is not None else None

    def logits(self, part: slice) -> Tensor:
        """(c, V) of a chunk."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            logits = self.hidden[part] @ self.weight[: self.vocab].T
        return logits if self.bias is None else logits + self.bias[: self.vocab]

    def backward(self, part: slice, grad: Tensor) -> None:
        """Takes the gradient (c, V) of a chunk's logits."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            if self._hidden is not None:
                self._hidden[part] = grad.to(self.weight.dtype) @ self.weight[: self.vocab]
            if self._weight is not None:
                wide = self._weight.dtype
                self._weight[: self.vocab].addmm_(grad.T.to(wide), self.hidden[part].to(wide))
        if self._bias is not None:
            self._bias[: self.vocab] += grad.sum(0)

    def grads(self) -> list[Tensor | None]:
        """Gradients of the hidden states and of the trained parameters, in the order of `OutputHead.parameters`."""
        return [self._hidden, *(g for g in (self._weight, self._bias) if g is not None)]


class ModulePass:
    """The same for any other head (adapters, quantized weights, caps): its own forward, and autograd in each chunk."""

    def __init__(self, hidden: Tensor, head: OutputHead, vocab: int, *, gradient: bool) -> None:
        self.hidden, self.head, self.vocab, self.gradient = hidden.detach(), head, vocab, gradient
        self._inputs: list[Tensor] = []
        self._logits: Tensor | None = None
        self._hidden = torch.zeros_like(hidden) if gradient else None
        self._parameters: list[Tensor | None] = [None] * len(head.parameters)

    def logits(self, part: slice) -> Tensor:
        """(c, V) of a chunk."""
        hidden = self.hidden[part]
        with torch.set_grad_enabled(self.gradient):
            if self.gradient:
                hidden.requires_grad_()
                self._inputs = [hidden, *self.head.parameters]
            self._logits = self.head(hidden)[:, : self.vocab]
        return self._logits.detach()

    def backward(self, part: slice, grad: Tensor) -> None:
        """Takes the gradient (c, V) of the logits that were made last."""
        if self._logits is None or self._hidden is None:
            raise RuntimeError("backward() follows logits() of the same rows.")
        found = torch.autograd.grad(self._logits, self._inputs, grad.to(self._logits.dtype), allow_unused=True)
        self._logits = None
        if found[0] is not None:
            self._hidden[part] = found[0]
        for i, more in enumerate(found[1:]):
            held = self._parameters[i]
            if more is not None:
                self._parameters[i] = more if held is None else held.add_(more)

    def grads(self) -> list[Tensor | None]:
        """Gradients of the hidden states and of the trained parameters, in the order of `OutputHead.parameters`."""
        return [self._hidden, *self._parameters]
