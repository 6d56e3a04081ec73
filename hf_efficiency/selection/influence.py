"""Influence as alignment of gradients: which examples move the model as the target does.

- `less`: cosine of the example's gradient with the target's (LESS, Xia et al. 2024, section 3.2, with plain gradients).
- `trak`: the same through the inverse of the gradients' covariance (TRAK, Park et al. 2023, equation 13).
- `datainf`: the closed form of DataInf (Kwon et al. 2024, equation 5), layer by layer.

As in LESS, gradients have length one, and an example counts by the part of the target that it helps the most: a mean
over the target would choose what all of its parts share. The gradient of a linear layer, Σ_t δ_t h_tᵀ, is projected
from both sides by random matrices (LoGra, Choe et al. 2024): A h and B δ are small, no gradient of full size is made,
the layers may be quantized, and for LoRA's own two layers this is the gradient of LoRA. Shape legend: b examples, t
tokens, l layers, f features of a layer, n rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_efficiency.selection.signals import labelled, token_logits

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

Method = Literal["less", "trak", "datainf"]
_GROUPS = 64
_ROUNDS = 10
_DAMPING = 0.1  # DataInf's section 4: λ is a tenth of the mean squared gradient


@dataclass(frozen=True)
class GradientFeatures:
    """Projected gradients of each example's mean loss.

    Attributes:
        rank: Each side of a layer's gradient is projected to so many dimensions; a layer gives rank² features.
        max_layers: Linear layers used, evenly spaced over the model; LoRA's own layers alone where there are some.
        seed: Of the projections.
    """

    rank: int = 8
    max_layers: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("max_layers", self.max_layers)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers whose gradients are taken.

        Raises:
            ValueError: the model has no linear layer but its head.
        """
        head = getattr(model, "get_output_embeddings", lambda: None)()
        linear = {name: module for name, module in model.named_modules() if module is not head and _is_linear(module)}
        adapters = {name: module for name, module in linear.items() if ".lora_A." in name or ".lora_B." in name}
        # an adapter's wrapper calls its base layer: one of both is enough
        chosen = adapters or {name: module for name, module in linear.items() if not hasattr(module, "base_layer")}
        if not chosen:
            raise ValueError("the model has no linear layer whose gradient could be taken.")
        names = list(chosen)
        step = max(1.0, len(names) / self.max_layers)
        kept = [names[int(i * step)] for i in range(min(len(names), self.max_layers))]
        return {name: chosen[name] for name in kept}

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Features (b, l, f) of each example, float32 on the CPU; examples without labels give zeros."""
        where, labels = labelled(batch)
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        layers = self.layers(model)
        handles = [module.register_forward_hook(_keep(name, inputs, outputs)) for name, module in layers.items()]
        handles.append(_with_gradient(model))
        try:
            with torch.enable_grad():
                losses = F.cross_entropy(token_logits(model, batch).float(), labels[where], reduction="none")
                share = 1 / where.sum(1, keepdim=True).clamp(min=1).expand_as(where)[where]
                used = [name for name in layers if name in outputs and outputs[name].ndim == 3]
                through = [outputs[name] for name in used]
                deltas = torch.autograd.grad((losses * share).sum(), through, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        features = [
            self._project(name, inputs[name].detach(), delta)
            if delta is not None
            else torch.zeros(len(where), self.rank**2)
            for name, delta in zip(used, deltas, strict=True)
        ]
        if not features:
            raise ValueError("none of the model's linear layers took part in the forward pass.")
        return torch.stack(features, 1)

    def _project(self, name: str, h: Tensor, delta: Tensor) -> Tensor:
        a, b = self._matrix(name, "in", h.shape[-1]), self._matrix(name, "out", delta.shape[-1])
        left, right = delta.float() @ b.to(delta.device), h.float() @ a.to(h.device)
        return torch.einsum("bti,btj->bij", left, right).flatten(1).cpu()

    def _matrix(self, name: str, side: str, width: int) -> Tensor:
        """Normal entries of variance 1 / rank, (width, rank), the same in every call; no wider than the layer."""
        if width <= self.rank:
            return F.pad(torch.eye(width), (0, self.rank - width))
        digest = hashlib.blake2b(f"{self.seed} {side} {name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return torch.randn(width, self.rank, generator=generator) / math.sqrt(self.rank)


def direction(method: Method, target: Tensor, sample: Tensor, damping: float = _DAMPING) -> Tensor:
    """The vector (l, f) whose product with an example's features is its influence: higher helps the target more.

    Args:
        method: `less`, `trak` or `datainf`.
        target: Features of the target, (l, f).
        sample: Features of some examples of the pool, (n, l, f), for the curvature.
        damping: λ relative to the mean squared gradient.

    Raises:
        ValueError: unknown method.
    """
    if method == "less":
        return target
    if method == "trak":
        return _ridge_solve(sample.flatten(1), target.flatten(), damping).view_as(target)
    if method == "datainf":
        return torch.stack([_datainf(sample[:, i], target[i], damping) for i in range(len(target))])
    raise ValueError(f"method={method!r} is unknown: use 'less', 'trak' or 'datainf'.")


def directions(
    method: Method, target: Tensor, sample: Tensor, damping: float = _DAMPING, groups: int = _GROUPS
) -> Tensor:
    """A direction of length one for each part of the target, (j, l, f).

    Args:
        method: As in `direction`.
        target: Features of the target's examples, (n, l, f). More than `groups` are joined to so many parts.
        sample: As in `direction`.
        damping: As in `direction`.
        groups: Parts of the target.

    Raises:
        ValueError: unknown method, or a gradient is not finite.
    """
    for name, tensor in (("target", target), ("pool", sample)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"a gradient of the {name} is NaN or infinite: load the model in float32 or bfloat16.")
    parts, pool = parts_of(unit(target), groups), unit(sample)
    return unit(torch.stack([direction(method, part, pool, damping) for part in parts]))


def influence(features: Tensor, along: Tensor) -> Tensor:
    """The largest cosine of features (b, l, f) with one of the directions (j, l, f), (b,)."""
    return (unit(features).flatten(1) @ along.flatten(1).T).amax(1)


def unit(features: Tensor) -> Tensor:
    """Features (n, l, f) scaled to length one over (l, f)."""
    return F.normalize(features.flatten(1), dim=1).view_as(features)


def parts_of(features: Tensor, groups: int) -> Tensor:
    """Features (n, l, f) of length one joined by k-means on the sphere to at most `groups` means, (j, l, f)."""
    if len(features) <= groups:
        return features
    flat = features.flatten(1)
    centers = flat[torch.linspace(0, len(flat) - 1, groups).long()]
    for _ in range(_ROUNDS):
        nearest = (flat @ centers.T).argmax(1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, flat)
        centers = F.normalize(torch.where(sums.any(1, keepdim=True), sums, centers), dim=1)
    return centers.view(-1, *features.shape[1:])


def target_features(
    gradients: GradientFeatures, model: nn.Module, batches: Iterable[Mapping[str, Any]], limit: int | None = None
) -> Tensor:
    """Features (n, l, f) of all examples of some batches, `limit` at most."""
    parts, count = [], 0
    for batch in batches:
        parts.append(gradients(model, batch))
        count += len(parts[-1])
        if limit is not None and count >= limit:
            break
    return torch.cat(parts)[:limit]


def _ridge_solve(x: Tensor, v: Tensor, damping: float) -> Tensor:
    """(XᵀX/n + λ I)⁻¹ v, through the smaller of the two Gram matrices."""
    n = len(x)
    damp = damping * (x * x).sum(1).mean() / min(x.shape)
    if not damp > 0:
        return v
    gram = x @ x.T / n
    inner = torch.linalg.solve(gram + damp * torch.eye(n), x @ v / n)
    return (v - x.T @ inner) / damp


def _datainf(g: Tensor, v: Tensor, damping: float) -> Tensor:
    """(1/λ) (v − (1/n) Σ_i (v·g_i) / (λ + ‖g_i‖²) g_i): the mean of the inverses for the inverse of the mean."""
    squares = (g * g).sum(1)
    damp = damping * squares.mean() / g.shape[1]
    if not damp > 0:
        return torch.zeros_like(v)
    weights = (g @ v) / (damp + squares)
    return (v - (weights[:, None] * g).mean(0)) / damp


def _is_linear(module: nn.Module) -> bool:
    # GPT-2's Conv1D names its sizes nx and nf
    return any(hasattr(module, a) and hasattr(module, b) for a, b in (("in_features", "out_features"), ("nx", "nf")))


def _keep(name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            inputs[name], outputs[name] = args[0], output

    return hook


def _with_gradient(model: nn.Module) -> RemovableHandle:
    """Lets gradients flow through a model whose parameters are all frozen, too."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_()

    handle: RemovableHandle = embeddings.register_forward_hook(hook)
    return handle
