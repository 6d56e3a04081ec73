"""Plain torch: the truth in tests, and what runs without a kernel.

Shape legend: b sequences, k drafted tokens of a chain, n nodes of a tree, m rows of draft distributions, v tokens.

A distribution is drawn from by inverse CDF over weights in fixed point, of 2^-44: sums of integers are the same in any
order, so kernel and reference, on any device and whatever else is in the batch, draw the same token from the same
uniform. A weight of zero adds nothing to the sum, and so is never drawn.
"""

import torch
from torch import Tensor

ONE = 2.0**44  # the fixed point of probability 1: 2^18 of them still fit 62 bits
# Mass of a draft distribution, below which what is left of it is rounding: its further children are passed over.
LEAST = 2.0**-20


def verify_chain(
    tokens: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Speculative sampling (Leviathan et al. 2023, Algorithm 1) of tokens (b, k), draft (b, k, v), target (b, k+1, v).

    Returns the accepted number (b,) and the next token (b,).
    """
    b, k = tokens.shape
    v = target.shape[2]
    step = torch.arange(k, device=tokens.device)
    drafted = (tokens >= 0) & (tokens < v) & (step < _counts(lengths, b, k, tokens.device)[:, None])
    count = drafted.long().cumprod(1).sum(1)
    q, p = _entries(draft, tokens), _entries(target[:, :k], tokens)
    passed = (uniforms[:, :k].double() * q < p) & (step < count[:, None])
    accepted = passed.long().cumprod(1).sum(1)
    row = torch.arange(b, device=tokens.device)
    p_row = target[row, accepted]
    if k == 0:
        return accepted, _draw(p_row, p_row, torch.zeros_like(accepted, dtype=torch.float64), uniforms[:, 0])
    scale = (accepted < count).double()
    return accepted, _draw(p_row, draft[row, accepted.clamp(max=k - 1)], scale, uniforms[:, k])


def verify_chain_logits(
    tokens: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor, lengths: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """`verify_chain` of softmax(logits / temperature), in float32. Shapes as there."""
    q, p = (torch.softmax(logits.float() / temperature, -1) for logits in (draft, target))
    return verify_chain(tokens, q, p, uniforms, lengths)


def verify_chain_greedy(tokens: Tensor, target: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Accepts tokens (b, k) while they are the argmax of target (b, k+1, v); the next is the argmax after them."""
    b, k = tokens.shape
    best = _best(target)  # (b, k+1)
    step = torch.arange(k, device=tokens.device)
    count = _counts(lengths, b, k, tokens.device)
    accepted = ((tokens == best[:, :k]) & (step < count[:, None])).long().cumprod(1).sum(1)
    return accepted, best.gather(1, accepted[:, None])[:, 0]


def verify_tree(
    tokens: Tensor,
    parents: Tensor,
    draft: Tensor,
    target: Tensor,
    uniforms: Tensor,
    lengths: Tensor | None,
    replacement: bool,
    max_depth: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Multi-round speculative sampling (SpecInfer, Miao et al. 2023, Algorithm 2) down a tree.

    The residual after some rejections at a node, norm(max(... norm(max(p - q, 0)) ... - q', 0)), is proportional to
    max(p - s q, 0) with one number s: each rejection adds the mass of the residual before it, divided by the mass of q
    that was left (1 with replacement, else without the tokens rejected so far, whose residual is 0 already).

    Args:
        tokens: (b, n). What is outside [0, v) is no node.
        parents: (b, n), each below its own index.
        draft: (b, m, v), row 0 for the root's children, row i + 1 for those of node i.
        target: (b, n+1, v), rows alike.
        uniforms: (b, n+1), one for each node, the last for the draw.
        lengths: (b,) nodes in use, or None.
        replacement: Whether the children of a node were drawn independently.
        max_depth: Of the path.

    Returns:
        Accepted nodes (b, max_depth), padded by -1; their number (b,); next token (b,).
    """
    b, n = tokens.shape
    device = tokens.device
    row = torch.arange(b, device=device)
    count = _counts(lengths, b, n, device)
    node = torch.full((b,), -1, device=device)  # where the path ends
    depth = torch.zeros_like(node)
    path = torch.full((b, max_depth), -1, device=device)
    scale = torch.zeros(b, dtype=torch.float64, device=device)
    mass, left = torch.ones_like(scale), torch.ones_like(scale)
    for i in range(n):
        open_ = (node + 1 < draft.shape[1]) & (depth < max_depth) & (mass > 0) & (left > LEAST)
        here = (parents[:, i] == node) & (i < count) & (tokens[:, i] >= 0) & (tokens[:, i] < target.shape[2]) & open_
        p_row, q_row = target[row, node + 1], _row(draft, row, node + 1)
        p, q = _entries(p_row, tokens[:, i]), _entries(q_row, tokens[:, i])
        passed = uniforms[:, i].double() * q * mass < _residual(p, q, scale).double() * left
        taken, refused = here & passed, here & ~passed
        if max_depth:
            at = depth.clamp(max=max_depth - 1)
            path[row, at] = torch.where(taken, i, path[row, at])
        scale = torch.where(refused, scale + mass / left, torch.where(taken, 0.0, scale))
        rest = _fixed(_residual(p_row, q_row, scale[:, None])).sum(-1).double() / ONE
        mass = torch.where(refused, rest, torch.where(taken, 1.0, mass))
        if not replacement:
            left = torch.where(refused, left - q.double(), left)
        left = torch.where(taken, 1.0, left)
        node, depth = torch.where(taken, i, node), depth + taken.long()
    return path, depth, _draw(target[row, node + 1], _row(draft, row, node + 1), scale, uniforms[:, n])


def verify_tree_greedy(
    tokens: Tensor, parents: Tensor, target: Tensor, lengths: Tensor | None, max_depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Follows the child whose token is the argmax of its parent's row of target (b, n+1, v), as `verify_tree` else."""
    b, n = tokens.shape
    best = _best(target)  # (b, n+1)
    count = _counts(lengths, b, n, tokens.device)
    node = torch.full((b,), -1, device=tokens.device)
    depth = torch.zeros_like(node)
    path = torch.full((b, max_depth), -1, device=tokens.device)
    row = torch.arange(b, device=tokens.device)
    for i in range(n if max_depth else 0):
        follows = (parents[:, i] == node) & (tokens[:, i] == best[row, node + 1])
        taken = follows & (i < count) & (depth < max_depth)
        at = depth.clamp(max=max_depth - 1)
        path[row, at] = torch.where(taken, i, path[row, at])
        node, depth = torch.where(taken, i, node), depth + taken.long()
    return path, depth, best[row, node + 1]


def _counts(lengths: Tensor | None, b: int, limit: int, device: torch.device) -> Tensor:
    """(b,) entries in use, at most `limit`."""
    return torch.full((b,), limit, device=device) if lengths is None else lengths.long().clamp(0, limit)


def _best(scores: Tensor) -> Tensor:
    """Lowest index of the largest score, over the last dimension. A NaN counts as -inf."""
    scores = torch.where(scores.isnan(), -torch.inf, scores.float())
    top = scores.amax(-1, keepdim=True)
    return (scores == top).to(torch.uint8).argmax(-1)


def _row(draft: Tensor, row: Tensor, index: Tensor) -> Tensor:
    """Rows of draft (b, m, v) by index (b,); zeros where there is none."""
    if draft.shape[1] == 0:
        return draft.new_zeros(len(row), draft.shape[2])
    found = draft[row, index.clamp(max=draft.shape[1] - 1)]
    return torch.where((index < draft.shape[1])[:, None], found, 0)


def _entries(rows: Tensor, tokens: Tensor) -> Tensor:
    """Entries of rows (..., v) at tokens (...), in float32; 0 for what is no token."""
    v = rows.shape[-1]
    found = rows.gather(-1, tokens.long().clamp(0, v - 1)[..., None])[..., 0].float()
    return torch.where((tokens >= 0) & (tokens < v), found, 0.0)


def _residual(p: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """max(p - scale q, 0) in float32, each operation rounded; 0 for a NaN. A scale of 0 leaves q out."""
    rest = p.float() - torch.where(scale > 0, scale.float() * q.float(), 0.0)
    return torch.where(rest > 0, rest, 0.0).clamp(max=1.0)


def _fixed(weights: Tensor) -> Tensor:
    """Weights in [0, 1] to integers, rounded down."""
    return (weights * ONE).long()


def _draw(p: Tensor, q: Tensor, scale: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens (b,) from max(p - scale q, 0), p and q (b, v), by inverse CDF; from p if that is empty; -1 if p is."""
    weights = _fixed(_residual(p, q, scale[:, None]))
    empty = weights.sum(-1, keepdim=True) == 0
    upto = torch.where(empty, _fixed(_residual(p, q, torch.zeros_like(scale)[:, None])), weights).cumsum(-1)
    total = upto[:, -1]
    threshold = (uniforms.double() * total.double()).long().minimum(total - 1).clamp(min=0)
    token = torch.searchsorted(upto, threshold[:, None], right=True)[:, 0]
    return torch.where(total > 0, token, -1)
