"""Five drafted tokens, two vocabularies. See `benchmarks/kernel_case.py`."""

from functools import partial

import torch
from kernel_case import Case, Run
from torch import Tensor

from hf_efficiency.kernels.spec_verify import (
    reference,
    verify_chain,
    verify_chain_greedy,
    verify_chain_logits,
    verify_tree,
)

_K = 5
_VOCABULARIES = (32000, 128256)
# Three children of the root, one with two children, another with a chain of four: 9 nodes.
_PARENTS = (-1, -1, -1, 0, 0, 1, 3, 5, 6)


def cases() -> list[Case]:
    """Few and many sequences. Bytes: each is refused somewhere, and reads one row of p and of q."""
    sizes = [(b, v) for v in _VOCABULARIES for b in (1, 8, 64)]
    made = [_chain(b, v) for b, v in sizes]
    made += [_logits(b, v) for b, v in sizes] + [_greedy(b, v) for b, v in sizes]
    return made + [_tree(b, v) for v in _VOCABULARIES for b in (1, 8)]


def _inputs(b: int, rows: int, v: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (b, rows, v) of draft and target, tokens (b, rows) drawn from the draft, uniforms that pass two."""
    torch.manual_seed(seed)
    draft = 2 * torch.randn(b, rows, v, device=device)
    target = 2 * torch.randn(b, rows + 1, v, device=device)
    tokens = torch.multinomial(torch.softmax(draft, -1).flatten(0, 1), 1).view(b, rows)
    uniforms = torch.rand(b, rows + 1, device=device)
    uniforms[:, : min(2, rows)], uniforms[:, 2:rows] = 0, 1
    return draft, target, tokens, uniforms


def eager_chain(tokens: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """What generation loops write: ratios, the residual, a cumulative sum, in float32 and without synchronising."""
    b, k = tokens.shape
    p, q = (rows.gather(-1, tokens[..., None])[..., 0] for rows in (target[:, :k], draft))
    accepted = (uniforms[:, :k] * q < p).long().cumprod(1).sum(1)
    row = torch.arange(b, device=tokens.device)
    rest = target[row, accepted] - draft[row, accepted.clamp(max=k - 1)] * (accepted < k)[:, None]
    upto = rest.clamp(min=0).cumsum(-1)
    token = torch.searchsorted(upto, uniforms[:, k:] * upto[:, -1:], right=True)[:, 0]
    return accepted, token.clamp(max=target.shape[2] - 1)


def _chain(b: int, v: int) -> Case:
    def make(device: torch.device, seed: int) -> dict[str, Run]:
        draft, target, tokens, uniforms = _inputs(b, _K, v, device, seed)
        q, p = torch.softmax(draft, -1), torch.softmax(target, -1)
        return {
            "kernel": lambda: verify_chain(tokens, q, p, uniforms),
            "reference": partial(reference.verify_chain, tokens, q, p, uniforms, None),
            "torch": lambda: eager_chain(tokens, q, p, uniforms),
        }

    return Case(f"chain {b} x {_K}, {v} tokens", 2 * 4 * b * v, 2 * b * v, make)


def _logits(b: int, v: int) -> Case:
    def make(device: torch.device, seed: int) -> dict[str, Run]:
        draft, target, tokens, uniforms = _inputs(b, _K, v, device, seed)
        draft, target = draft.bfloat16(), target.bfloat16()

        def eager() -> tuple[Tensor, Tensor]:
            q, p = (torch.softmax(x.float(), -1) for x in (draft, target))
            return eager_chain(tokens, q, p, uniforms)

        return {
            "kernel": lambda: verify_chain_logits(tokens, draft, target, uniforms),
            "reference": partial(reference.verify_chain_logits, tokens, draft, target, uniforms, None, 1.0),
            "torch": eager,
        }

    return Case(f"chain of logits {b} x {_K}, {v} tokens", 2 * (2 * _K + 1) * b * v, 4 * (2 * _K + 1) * b * v, make)


def _greedy(b: int, v: int) -> Case:
    def make(device: torch.device, seed: int) -> dict[str, Run]:
        _, target, tokens, _ = _inputs(b, _K, v, device, seed)
        target = target.bfloat16()
        tokens[:, :2] = target[:, :2].argmax(-1)

        def eager() -> tuple[Tensor, Tensor]:
            best = target.argmax(-1)
            accepted = (tokens == best[:, :_K]).long().cumprod(1).sum(1)
            return accepted, best.gather(1, accepted[:, None])[:, 0]

        return {
            "kernel": lambda: verify_chain_greedy(tokens, target),
            "reference": partial(reference.verify_chain_greedy, tokens, target, None),
            "torch": eager,
        }

    return Case(f"greedy chain {b} x {_K}, {v} tokens", 2 * (_K + 1) * b * v, (_K + 1) * b * v, make)


def _tree(b: int, v: int) -> Case:
    n = len(_PARENTS)

    def make(device: torch.device, seed: int) -> dict[str, Run]:
        draft, target, tokens, uniforms = _inputs(b, n, v, device, seed)
        q, p = torch.softmax(draft, -1), torch.softmax(target, -1)
        parents = torch.tensor(_PARENTS, device=device).expand(b, n).contiguous()
        for node in sorted(set(_PARENTS)):
            children = [i for i, parent in enumerate(_PARENTS) if parent == node]
            tokens[:, children] = torch.multinomial(q[:, node + 1], len(children), replacement=True)
        uniforms[:, :n] = 1  # the children of the root are refused, mostly: three passes over two rows
        return {
            "kernel": lambda: verify_tree(tokens, parents, q, p, uniforms),
            "reference": partial(reference.verify_tree, tokens, parents, q, p, uniforms, None, True, n),
        }

    return Case(f"tree {b} x {n}, {v} tokens", 2 * 4 * b * v, 6 * b * v, make)
