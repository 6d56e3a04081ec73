"""The operators: checked arguments and meta implementations. There is nothing to differentiate.

Shape legend: b sequences, k drafted tokens of a chain, n nodes of a tree, m rows of draft distributions, v tokens.
"""

import torch
from torch import Tensor

from ._launch import namespace, run

_NAMESPACE = namespace(__package__)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_INTEGERS = (torch.int32, torch.int64)


def verify_chain(
    draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Speculative sampling (Leviathan et al. 2023, Algorithm 1; Chen et al. 2023): the target's distribution, exactly.

    Token x_i is accepted while u_i < p_i(x_i) / q_i(x_i). The next token is then drawn from norm(max(p - q, 0)) at the
    first token refused, or from p after the last. The result depends on a sequence's own arguments alone, and not on
    the device, the batch around it or the order of sums: these are of integers (probabilities rounded down to multiples
    of 2^-44). A token whose probability there is zero is never drawn.

    Args:
        draft_tokens: (b, k) int64 or int32. One outside [0, v) is no draft, and ends its chain.
        draft_probs: (b, k, v) float16, bfloat16 or float32, rows of sum 1: what each token was drawn from.
        target_probs: (b, k+1, v), rows of sum 1: the target's distribution in place of each drafted token, and after.
        uniforms: (b, k+1) float32 in [0, 1), independent of the drafts. The last column draws the next token.
        lengths: (b,) int64 or int32, tokens drafted in each sequence, at most k; all k without. What lies behind, in
            the first three arguments, is not used.

    Returns:
        Number of accepted tokens (b,) int64; next token (b,) int64, -1 where the target's row has no probability above
        zero (all NaN, say).

    Raises:
        ValueError: Shapes, devices or dtypes that don't match.
    """
    _check_chain(draft_tokens, target_probs, "target_probs", lengths)
    _check_draft(draft_tokens, draft_probs, target_probs, "probs")
    _check_uniforms(uniforms, draft_tokens)
    result: tuple[Tensor, Tensor] = _verify_chain(draft_tokens, draft_probs, target_probs, uniforms, lengths)
    return result


def verify_chain_logits(
    draft_tokens: Tensor,
    draft_logits: Tensor,
    target_logits: Tensor,
    uniforms: Tensor,
    lengths: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`verify_chain` of softmax(logits / temperature), in float32 and without writing a probability.

    Normalisers are rounded, and differently on different devices: a draw within that rounding of a token's border may
    differ.

    Args:
        draft_tokens: (b, k) int64 or int32.
        draft_logits: (b, k, v) float16, bfloat16 or float32; -inf for tokens that can't be drawn.
        target_logits: (b, k+1, v).
        uniforms: (b, k+1) float32 in [0, 1). The last column draws the next token.
        lengths: (b,) int64 or int32, tokens drafted in each sequence; all k without.
        temperature: Above zero, the same for draft and target.

    Returns:
        Number of accepted tokens (b,) int64; next token (b,) int64.

    Raises:
        ValueError: Shapes, devices or dtypes that don't match, or a temperature that is not above zero.
    """
    _check_chain(draft_tokens, target_logits, "target_logits", lengths)
    _check_draft(draft_tokens, draft_logits, target_logits, "logits")
    _check_uniforms(uniforms, draft_tokens)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}: it must be above zero; `verify_chain_greedy` is its limit.")
    result: tuple[Tensor, Tensor] = _verify_chain_logits(
        draft_tokens, draft_logits, target_logits, uniforms, lengths, float(temperature)
    )
    return result


def verify_chain_greedy(
    draft_tokens: Tensor, target_scores: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Accepts drafted tokens while each is the target's argmax; the next token is the argmax after them.

    Args:
        draft_tokens: (b, k) int64 or int32.
        target_scores: (b, k+1, v) float16, bfloat16 or float32 logits or probabilities. Of equal scores the lowest
            index wins, as with `torch.argmax`; a NaN counts as -inf.
        lengths: (b,) int64 or int32, tokens drafted in each sequence; all k without.

    Returns:
        Number of accepted tokens (b,) int64; next token (b,) int64.

    Raises:
        ValueError: Shapes, devices or dtypes that don't match.
    """
    _check_chain(draft_tokens, target_scores, "target_scores", lengths)
    result: tuple[Tensor, Tensor] = _verify_chain_greedy(draft_tokens, target_scores, lengths)
    return result


def verify_tree(
    draft_tokens: Tensor,
    parents: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    uniforms: Tensor,
    lengths: Tensor | None = None,
    *,
    replacement: bool = True,
    max_depth: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Multi-round speculative sampling down a tree (SpecInfer, Miao et al. 2023, Algorithm 2), exact as `verify_chain`.

    From the root on, the children of the node reached are tried in order: child x is accepted if u < p(x) / q(x), and
    the path goes on from there; else p becomes norm(max(p - q, 0)) and, where children are drawn without replacement,
    q becomes norm(q without x). Where no child is left, the next token is drawn from p. Sums are as in `verify_chain`.

    Args:
        draft_tokens: (b, n) int64 or int32. What is outside [0, v) is no node.
        parents: (b, n) int64 or int32, of each node: -1 for the root's children, else an index below the node's own (a
            node whose parent comes later is never reached). Children of one node stand in the order in which they were
            drawn, not sorted by what was drawn.
        draft_probs: (b, m, v) float16, bfloat16 or float32: row 0 is what the root's children were drawn from, row
            i + 1 what those of node i were. m may be less than n + 1 where the last nodes have no children: what would
            be children of nodes without a row is passed over.
        target_probs: (b, n+1, v): row 0 follows the root, row i + 1 node i.
        uniforms: (b, n+1) float32 in [0, 1), independent of the drafts: one for each node; the last draws the token.
        lengths: (b,) int64 or int32, nodes in use in each sequence; all n without.
        replacement: Whether the children of a node were drawn independently from its row of `draft_probs`; False for
            children drawn one after the other without replacement (as `torch.multinomial` does).
        max_depth: Longest path wanted, and the width of the result; n without.

    Returns:
        Nodes accepted (b, max_depth) int64, padded by -1; their number (b,) int64; next token (b,) int64, -1 where the
        target's row has no probability above zero.

    Raises:
        ValueError: Shapes, devices or dtypes that don't match.
    """
    depth = _check_tree(draft_tokens, parents, target_probs, "target_probs", lengths, max_depth)
    check_floating("draft_probs", draft_probs)
    (b, n), v = draft_tokens.shape, target_probs.shape[-1]
    if draft_probs.dim() != 3 or draft_probs.shape[::2] != (b, v) or draft_probs.shape[1] > n + 1:
        raise ValueError(
            f"draft_probs has shape {tuple(draft_probs.shape)}, draft_tokens {tuple(draft_tokens.shape)} and "
            f"target_probs {tuple(target_probs.shape)}: it must be ({b}, m, {v}) with m at most {n + 1}."
        )
    check_together("draft_tokens", draft_tokens, "draft_probs", draft_probs)
    _check_uniforms(uniforms, draft_tokens)
    result: tuple[Tensor, Tensor, Tensor] = _verify_tree(
        draft_tokens, parents, draft_probs, target_probs, uniforms, lengths, replacement, depth
    )
    return result


def verify_tree_greedy(
    draft_tokens: Tensor,
    parents: Tensor,
    target_scores: Tensor,
    lengths: Tensor | None = None,
    *,
    max_depth: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Follows, from the root on, the first child whose token is the target's argmax; the next token is the last argmax.

    Args:
        draft_tokens: (b, n) int64 or int32.
        parents: (b, n) int64 or int32, as for `verify_tree`.
        target_scores: (b, n+1, v) logits or probabilities: row 0 follows the root, row i + 1 node i. Ties and NaN as in
            `verify_chain_greedy`.
        lengths: (b,) int64 or int32, nodes in use in each sequence; all n without.
        max_depth: Longest path wanted, and the width of the result; n without.

    Returns:
        Nodes accepted (b, max_depth) int64, padded by -1; their number (b,) int64; next token (b,) int64.

    Raises:
        ValueError: Shapes, devices or dtypes that don't match.
    """
    depth = _check_tree(draft_tokens, parents, target_scores, "target_scores", lengths, max_depth)
    result: tuple[Tensor, Tensor, Tensor] = _verify_tree_greedy(draft_tokens, parents, target_scores, lengths, depth)
    return result


def check_floating(name: str, x: Tensor) -> None:
    """ValueError unless a kernel takes the dtype of x."""
    if x.dtype not in _FLOATS:
        raise ValueError(f"{name} is {x.dtype}: cast it to float16, bfloat16 or float32.")


def check_integers(name: str, x: Tensor) -> None:
    """ValueError unless x holds int32 or int64."""
    if x.dtype not in _INTEGERS:
        raise ValueError(f"{name} is {x.dtype}: cast it to int64 or int32.")


def check_together(first: str, x: Tensor, second: str, y: Tensor) -> None:
    """ValueError unless two tensors lie on one device."""
    if x.device != y.device:
        raise ValueError(f"{first} lies on {x.device} and {second} on {y.device}: move them to one device.")


def _check_chain(tokens: Tensor, target: Tensor, name: str, lengths: Tensor | None) -> None:
    check_integers("draft_tokens", tokens)
    check_floating(name, target)
    if tokens.dim() != 2 or target.dim() != 3 or target.shape[:2] != (tokens.shape[0], tokens.shape[1] + 1):
        raise ValueError(
            f"draft_tokens has shape {tuple(tokens.shape)} and {name} {tuple(target.shape)}: they must be (b, k) and "
            "(b, k + 1, v)."
        )
    if target.shape[2] == 0:
        raise ValueError(f"{name} has shape {tuple(target.shape)}: there is no token to choose.")
    check_together("draft_tokens", tokens, name, target)
    if lengths is not None:
        check_integers("lengths", lengths)
        if lengths.shape != tokens.shape[:1]:
            raise ValueError(
                f"lengths has shape {tuple(lengths.shape)} and draft_tokens {tuple(tokens.shape)}: it must be "
                f"({tokens.shape[0]},)."
            )
        check_together("draft_tokens", tokens, "lengths", lengths)


def _check_tree(
    tokens: Tensor, parents: Tensor, target: Tensor, name: str, lengths: Tensor | None, max_depth: int | None
) -> int:
    """The width of the path."""
    _check_chain(tokens, target, name, lengths)
    check_integers("parents", parents)
    if parents.shape != tokens.shape:
        raise ValueError(
            f"parents has shape {tuple(parents.shape)} and draft_tokens {tuple(tokens.shape)}: they must be alike."
        )
    check_together("draft_tokens", tokens, "parents", parents)
    if max_depth is not None and max_depth < 0:
        raise ValueError(f"max_depth is {max_depth}: it must be 0 or more.")
    return tokens.shape[1] if max_depth is None else max_depth


def _check_draft(tokens: Tensor, draft: Tensor, target: Tensor, kind: str) -> None:
    check_floating(f"draft_{kind}", draft)
    wanted = (*tokens.shape, target.shape[2])
    if draft.shape != wanted:
        raise ValueError(
            f"draft_{kind} has shape {tuple(draft.shape)}, draft_tokens {tuple(tokens.shape)} and target_{kind} "
            f"{tuple(target.shape)}: it must be {wanted}."
        )
    check_together("draft_tokens", tokens, f"draft_{kind}", draft)


def _check_uniforms(uniforms: Tensor, tokens: Tensor) -> None:
    wanted = (tokens.shape[0], tokens.shape[1] + 1)
    if uniforms.dtype != torch.float32:
        raise ValueError(f"uniforms is {uniforms.dtype}: it must be float32, coarser ones would bias the draw.")
    if uniforms.shape != wanted:
        raise ValueError(
            f"uniforms has shape {tuple(uniforms.shape)} and draft_tokens {tuple(tokens.shape)}: it must be {wanted}."
        )
    check_together("draft_tokens", tokens, "uniforms", uniforms)


@torch.library.custom_op(f"{_NAMESPACE}::verify_chain", mutates_args=())
def _verify_chain(
    tokens: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = run(__package__, "verify_chain", tokens, draft, target, uniforms, lengths)
    return result


@_verify_chain.register_fake
def _(tokens: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    return _like_chain(tokens)


@torch.library.custom_op(f"{_NAMESPACE}::verify_chain_logits", mutates_args=())
def _verify_chain_logits(
    tokens: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor, lengths: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = run(
        __package__, "verify_chain_logits", tokens, draft, target, uniforms, lengths, temperature
    )
    return result


@_verify_chain_logits.register_fake
def _(
    tokens: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor, lengths: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    return _like_chain(tokens)


@torch.library.custom_op(f"{_NAMESPACE}::verify_chain_greedy", mutates_args=())
def _verify_chain_greedy(tokens: Tensor, target: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = run(__package__, "verify_chain_greedy", tokens, target, lengths)
    return result


@_verify_chain_greedy.register_fake
def _(tokens: Tensor, target: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    return _like_chain(tokens)


@torch.library.custom_op(f"{_NAMESPACE}::verify_tree", mutates_args=())
def _verify_tree(
    tokens: Tensor,
    parents: Tensor,
    draft: Tensor,
    target: Tensor,
    uniforms: Tensor,
    lengths: Tensor | None,
    replacement: bool,
    max_depth: int,
) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = run(
        __package__, "verify_tree", tokens, parents, draft, target, uniforms, lengths, replacement, max_depth
    )
    return result


@_verify_tree.register_fake
def _(
    tokens: Tensor,
    parents: Tensor,
    draft: Tensor,
    target: Tensor,
    uniforms: Tensor,
    lengths: Tensor | None,
    replacement: bool,
    max_depth: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like_tree(tokens, max_depth)


@torch.library.custom_op(f"{_NAMESPACE}::verify_tree_greedy", mutates_args=())
def _verify_tree_greedy(
    tokens: Tensor, parents: Tensor, target: Tensor, lengths: Tensor | None, max_depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = run(
        __package__, "verify_tree_greedy", tokens, parents, target, lengths, max_depth
    )
    return result


@_verify_tree_greedy.register_fake
def _(
    tokens: Tensor, parents: Tensor, target: Tensor, lengths: Tensor | None, max_depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _like_tree(tokens, max_depth)


def _like_chain(tokens: Tensor) -> tuple[Tensor, Tensor]:
    b = tokens.shape[0]
    return tokens.new_empty(b, dtype=torch.int64), tokens.new_empty(b, dtype=torch.int64)


def _like_tree(tokens: Tensor, max_depth: int) -> tuple[Tensor, Tensor, Tensor]:
    return tokens.new_empty((tokens.shape[0], max_depth), dtype=torch.int64), *_like_chain(tokens)
