"""Heads of common models. See `benchmarks/kernel_case.py`."""

import torch
from kernel_case import Case, Run
from torch import Tensor

from hf_efficiency.kernels.distill_loss import chunked, distill_loss, reference

_HALF = 2  # bytes of a bfloat16
_ROWS = 4096
_GOAL = "under 10 % of the plain loss's memory, inputs and gradients aside, and no slower"


def cases() -> list[Case]:
    """Loss and gradients of 4096 tokens, with a trained head and with a frozen one (as LoRA has)."""
    made = [_case(vocab, d, "forward_kl", True) for vocab in (32000, 128256, 256000) for d in (2048, 4096)]
    made += [_case(128256, 4096, kind, True) for kind in ("reverse_kl", "jsd")]
    made.append(_case(128256, 4096, "forward_kl", False))
    return made


def _case(vocab: int, d: int, kind: str, trains_head: bool) -> Case:
    def make(device: torch.device, seed: int) -> dict[str, Run]:
        torch.manual_seed(seed)
        options = {"device": device, "dtype": torch.bfloat16}
        x, y = (torch.randn(_ROWS, d, **options) for _ in range(2))
        w, u = (torch.randn(vocab, d, **options) * (2 / d**0.5) for _ in range(2))
        x.requires_grad_()
        w.requires_grad_(trains_head)
        leaves = (x, w) if trains_head else (x,)

        def with_gradients(loss: Tensor) -> tuple[Tensor, ...]:
            return loss.detach(), *torch.autograd.grad(loss, leaves)

        def chunked() -> tuple[Tensor, ...]:
            ones = torch.ones(_ROWS, device=device)
            args = (kind, 0.5, 1.0, vocab, 0, [True, trains_head, False])
            losses, hidden, head, _ = reference.divergences(x.detach(), w.detach(), y, u, ones, None, None, *args)
            grads = (hidden, head) if trains_head else (hidden,)
            return losses.mean(), *(g / _ROWS for g in grads)

        def ours(**options: bool | int) -> Run:
            return lambda: with_gradients(distill_loss(x, w, y, u, divergence=kind, **options))

        return {
            "kernel": ours(),
            "reference": chunked,
            "kernel, gradients recomputed": ours(recompute=True),
            "kernel, chunks of 1024 rows": ours(chunk_rows=1024),
            "plain loss": lambda: with_gradients(_plain(x, w, y, u, kind)),
        }

    products = 8 if trains_head else 6
    moved = (3 * _ROWS * d + (3 if trains_head else 2) * vocab * d) * _HALF
    label = f"{kind} {_ROWS} x {d}, V {vocab}{'' if trains_head else ', frozen head'}"
    memory = _memory(vocab, d, trains_head)
    return Case(label, moved, products * _ROWS * vocab * d, make, goal=_GOAL, memory=memory)


def _memory(vocab: int, d: int, trains_head: bool) -> dict[str, int]:
    """Bytes held beyond inputs and gradients.

    Ours: a chunk's logits of both models, or, later, the head's gradient once more while the backward pass scales it.
    The plain loss: at least five float32 tensors of all logits in its forward pass, log-probabilities of both, their
    difference, an exponential, and the product.
    """
    logits = 2 * chunked.rows_of_chunk(_ROWS, vocab, True, trains_head) * vocab * _HALF
    kept = max(logits, vocab * d * _HALF if trains_head else _ROWS * d * _HALF)
    return {"gradients kept": kept, "gradients recomputed": logits, "plain loss": 5 * _ROWS * vocab * 4}


def _plain(x: Tensor, w: Tensor, y: Tensor, u: Tensor, kind: str) -> Tensor:
    """What trainers do: whole logits of both, in float32 from there on."""
    log_q = (x @ w.T).float().log_softmax(-1)
    with torch.no_grad():
        log_p = (y @ u.T).float().log_softmax(-1)
    if kind == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
        return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2
    return _kl(log_p, log_q) if kind == "forward_kl" else _kl(log_q, log_p)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return torch.nn.functional.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1).mean()
