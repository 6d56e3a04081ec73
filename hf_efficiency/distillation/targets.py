"""What a teacher says of the next token: all its logits, or the most likely tokens and the mass of the rest.

Shape legend: c rows (tokens), V vocabulary, k tokens kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_efficiency.distillation.losses import Objective, log_softmax

_SMALLEST = -60.0  # log of the least mass that the rest is given


@dataclass(frozen=True)
class TopK:
    """A cached distribution at one temperature.

    Attributes:
        ids: (c, k) int64, the most likely tokens, in falling order.
        log_p: (c, k) float32.
        log_rest: (c,) float32, log of the mass of all other tokens.
    """

    ids: Tensor
    log_p: Tensor
    log_rest: Tensor

    def outcomes(self) -> Tensor:
        """Log-probabilities (c, k + 1) of the kept tokens and of the rest."""
        return torch.cat([self.log_p, self.log_rest[:, None]], -1)

    def merged(self, log_q: Tensor) -> Tensor:
        """Log-probabilities (c, k + 1) that log_q (c, V) gives to the same outcomes."""
        return torch.cat([log_q.gather(-1, self.ids), _log_rest(log_q, self.ids)[:, None]], -1)

    def spread(self, grad: Tensor, log_q: Tensor, merged: Tensor) -> Tensor:
        """From the gradient (c, k + 1) with respect to merged logits to that (c, V) of all logits.

        The rest's part falls to its tokens in the proportion of their probabilities, by the chain rule.
        """
        share = (log_q - merged[:, -1:]).exp_().mul_(grad[:, -1:])
        return share.scatter_(-1, self.ids, grad[:, :-1])


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The k most likely tokens of logits (c, V).

    Raises:
        ValueError: k is below 1 or not below V.
    """
    if not 1 <= k < logits.shape[-1]:
        raise ValueError(f"top_k={k} must be at least 1 and below the vocabulary's {logits.shape[-1]}.")
    log_p = log_softmax(logits, temperature)
    kept, ids = log_p.topk(k, -1)
    return TopK(ids, kept, _log_rest(log_p, ids))


def _log_rest(log_p: Tensor, ids: Tensor) -> Tensor:
    """Log of the mass (c,) of all tokens but those of `ids` (c, k)."""
    return log_p.scatter(-1, ids, float("-inf")).logsumexp(-1).clamp_(min=_SMALLEST)


Target = Tensor | TopK  # Tensor: logits (c, V or more)


def soft_loss(
    objective: Objective, target: Target, log_q: Tensor, *, gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The soft loss (c,) and its gradient (c, V), of log_q (c, V) at the objective's temperature.

    Against a cache the divergence is that over k + 1 outcomes, of which the last is "any other token": a lower bound
    on the full one (data processing), equal to it where teacher and student agree on the shape of the tail.
    """
    if isinstance(target, Tensor):
        log_p = log_softmax(target[:, : log_q.shape[-1]], objective.temperature)
        return objective.soft(log_p, log_q, gradient=gradient)
    merged = target.merged(log_q)
    losses, grad = objective.soft(target.outcomes(), merged, gradient=gradient)
    return losses, None if grad is None else target.spread(grad, log_q, merged)


def closeness(target: Target, log_q: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    """How close log_q (c, V) is to the teacher: each entry (c,), for the log.

    `kl` is KL(p ‖ q), `agreement` 1 where both would choose the same token, `acceptance` the chance sum min(p, q) that
    the teacher accepts the student's draft (Leviathan et al. 2023, corollary 3.6). Against a cache, kl is a lower
    bound and acceptance an upper one, by what is hidden in the rest.

    Args:
        target: The teacher's logits, or a cache's rows.
        log_q: Of the student, at `temperature`.
        temperature: At which logits are compared; a cache has its own.
    """
    best = log_q.argmax(-1)
    if isinstance(target, Tensor):
        log_p = log_softmax(target[:, : log_q.shape[-1]], temperature)
        agreement = log_p.argmax(-1) == best
    else:
        log_p, log_q, agreement = target.outcomes(), target.merged(log_q), target.ids[:, 0] == best
    p = log_p.exp()
    acceptance = torch.minimum(log_p, log_q).exp_().sum(-1)
    return {"kl": (p * (log_p - log_q)).sum(-1), "agreement": agreement.to(p.dtype), "acceptance": acceptance}
