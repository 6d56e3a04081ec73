"""Divergences of a student's next-token distribution q from a teacher's p, with their gradients.

Shape legend: c rows (tokens), V outcomes: the vocabulary, or the k tokens of a cache and all the rest as one.

z are the student's logits divided by the temperature, q = softmax(z). For any divergence D, with g = dD/dq,
dD/dz_j = q_j (g_j - sum_i q_i g_i), in which a constant in g cancels:

- forward KL, KL(p ‖ q): g = -p / q, so dD/dz = q - p.
- reverse KL, KL(q ‖ p): g = log(q / p).
- JSD (GKD, Agarwal et al. 2024, section 2), beta KL(p ‖ m) + (1 - beta) KL(q ‖ m), m = beta p + (1 - beta) q:
  g = (1 - beta) log(q / m).
- skew KL (DistiLLM, Ko et al. 2024, section 3.1), KL(p ‖ m), m = s p + (1 - s) q: g = -(1 - s) p / m.
- skew reverse KL (the same), KL(q ‖ m), m = s q + (1 - s) p: g = log(q / m) - s q / m.
- total variation, sum |p - q| / 2: g = sign(q - p) / 2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation")

# Below the log of anything that counts; finite, so that 0 · log 0 is 0 where a model gives a logit of -inf.
_FLOOR = -1e4


@dataclass(frozen=True)
class Objective:
    """What is minimised over the logits: alpha · (soft loss) + (1 - alpha) · (cross-entropy with the labels).

    The soft loss is taken at the temperature and multiplied by its square, so that its gradients keep their size
    (Hinton et al. 2015, section 2.1); total variation, which is no quadratic form of the difference of the logits but
    a linear one, by the temperature itself. The hard loss is taken at temperature 1.

    Attributes:
        divergence: One of `DIVERGENCES`, or several with their weights.
        beta: Of `"jsd"`, from 0 to 1. As in GKD, 0 stands for the forward KL and 1 for the reverse.
        skew: Share of the other distribution in the mixture of the skew divergences, at least 0 and below 1.
        temperature: Above 0.
        alpha: Weight of the soft loss, from 0 to 1.
    """

    divergence: str | Mapping[str, float] = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1
    temperature: float = 1.0
    alpha: float = 1.0
    parts: tuple[tuple[str, float], ...] = field(init=False)

    def __post_init__(self) -> None:
        given = {self.divergence: 1.0} if isinstance(self.divergence, str) else dict(self.divergence)
        if not given:
            raise ValueError(f"divergence is empty: name at least one of {', '.join(DIVERGENCES)}.")
        for name, weight in given.items():
            if name not in DIVERGENCES:
                raise ValueError(f"divergence={name!r} is unknown: choose one of {', '.join(DIVERGENCES)}.")
            if not 0 < weight < math.inf:
                raise ValueError(f"divergence gives {name!r} the weight {weight}: it must be above 0.")
        for name, low, high in (("beta", 0, 1), ("alpha", 0, 1), ("skew", 0, math.nextafter(1, 0))):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}={value} must be from {low} to {'below 1' if name == 'skew' else high}.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be above 0.")
        named = {"jsd": {0.0: "forward_kl", 1.0: "reverse_kl"}.get(float(self.beta), "jsd")}
        if self.skew == 0:
            named |= {"skew_kl": "forward_kl", "skew_reverse_kl": "reverse_kl"}
        parts = tuple((named.get(name, name), float(weight)) for name, weight in given.items())
        object.__setattr__(self, "parts", parts)

    def scale(self, name: str) -> float:
        """What a divergence is multiplied by on account of the temperature."""
        return self.temperature if name == "total_variation" else self.temperature**2

    def soft(self, log_p: Tensor, log_q: Tensor, *, gradient: bool = True) -> tuple[Tensor, Tensor | None]:
        """The soft loss (c,) and its gradient (c, V) with respect to the logits.

        Args:
            log_p: (c, V) of the teacher, at the temperature.
            log_q: (c, V) of the student, at the temperature.
            gradient: Whether the gradient is wanted.
        """
        losses, total = None, None
        for name, weight in self.parts:
            value, grad = divergence(name, log_p, log_q, beta=self.beta, skew=self.skew, gradient=gradient)
            factor = weight * self.scale(name)
            value = value if factor == 1 else value * factor
            losses = value if losses is None else losses + value
            if grad is not None:
                grad = grad if factor == self.temperature else grad.mul_(factor / self.temperature)
                total = grad if total is None else total.add_(grad)
        return losses, total  # type: ignore[return-value]  # there is at least one part


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (c, V) in float32 or wider, none below -10,000."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        wide = wide / temperature
    return torch.log_softmax(wide, -1).clamp_(min=_FLOOR)


def divergence(
    name: str, log_p: Tensor, log_q: Tensor, *, beta: float = 0.5, skew: float = 0.1, gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """One divergence (c,) of log_q (c, V) from log_p (c, V), and its gradient (c, V) with respect to z.

    Neither the temperature nor its square is in it. The gradient is a tensor of its own.
    """
    q = log_q.exp()
    if name == "forward_kl":
        p = log_p.exp()
        values = _expectation(p, log_p - log_q)
        return values, q.sub_(p) if gradient else None
    if name == "reverse_kl":
        log_ratio = log_q - log_p
        values = _expectation(q, log_ratio)
        return values, _centred(q, log_ratio, values) if gradient else None
    if name == "jsd":
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        log_ratio = log_q - log_m
        of_student = _expectation(q, log_ratio)
        values = beta * _expectation(log_p.exp(), log_p - log_m) + (1 - beta) * of_student
        return values, _centred(q, log_ratio, of_student).mul_(1 - beta) if gradient else None
    if name == "skew_kl":
        log_m = torch.logaddexp(log_p + math.log(skew), log_q + math.log1p(-skew))
        log_ratio = log_p - log_m
        values = _expectation(log_p.exp(), log_ratio)
        return values, _centred(q, log_ratio.exp_()).mul_(-(1 - skew)) if gradient else None
    if name == "skew_reverse_kl":
        log_m = torch.logaddexp(log_q + math.log(skew), log_p + math.log1p(-skew))
        log_ratio = log_q - log_m
        values = _expectation(q, log_ratio)
        return values, _centred(q, log_ratio - skew * log_ratio.exp()) if gradient else None
    difference = q - log_p.exp()
    values = difference.abs().sum(-1) / 2
    return values, _centred(q, difference.sign_()).div_(2) if gradient else None


def _expectation(p: Tensor, x: Tensor) -> Tensor:
    return torch.linalg.vecdot(p, x)


def _centred(q: Tensor, g: Tensor, mean: Tensor | None = None) -> Tensor:
    """q (g - E_q g), which overwrites g."""
    mean = _expectation(q, g) if mean is None else mean
    return g.sub_(mean[:, None]).mul_(q)
