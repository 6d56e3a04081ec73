"""Which drafted tokens the target accepts, and the token after them.

The draws are those of the kernel project `spec_verify`: its Triton kernels on a GPU, its plain torch elsewhere.

Shape legend: b rows, n drafted tokens, v tokens of the vocabulary.
"""

import torch
from torch import Tensor

from hf_efficiency.generation.speculative.draft import Draft
from hf_efficiency.kernels.spec_verify import (
    reference,
    verify_chain,
    verify_chain_greedy,
    verify_tree,
    verify_tree_greedy,
)


def verify(draft: Draft, scores: Tensor, *, greedy: bool) -> tuple[list[list[int]], list[int]]:
    """Accepts drafted tokens so that the text is the target's own.

    Greedy: tokens that are the argmax of the scores before them. Else speculative sampling (Leviathan et al. 2023,
    Algorithm 1), for trees in rounds without replacement (SpecInfer, Miao et al. 2023, Algorithm 2): whatever the draft
    was, the text has the distribution of the softmax of the scores. Draws use torch's random state.

    Args:
        draft: Of n tokens.
        scores: (b, n + 1, v) float32: row 0 follows the text, row i + 1 drafted token i.
        greedy: Whether to take the best token.

    Returns:
        Of each row the accepted tokens' numbers in the draft, in order; of each row the token after them.

    Raises:
        ValueError: Scores of a row that leave no token.
    """
    if draft.parents is None:
        count, after = _verify_chain(draft, scores, greedy)
        return [list(range(accepted)) for accepted in count.tolist()], _tokens(after)
    path, count, after = _verify_tree(draft, scores, greedy)
    paths = [row[:accepted] for row, accepted in zip(path.tolist(), count.tolist(), strict=True)]
    return paths, _tokens(after)


def _verify_chain(draft: Draft, scores: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
    tokens = draft.tokens
    if greedy:
        kernel = verify_chain_greedy if scores.is_cuda else reference.verify_chain_greedy
        return kernel(tokens, scores, None)
    chain = verify_chain if scores.is_cuda else reference.verify_chain
    return chain(tokens, _drawn_from(draft, scores), _probs(scores), _uniforms(tokens, scores), None)


def _verify_tree(draft: Draft, scores: Tensor, greedy: bool) -> tuple[Tensor, Tensor, Tensor]:
    tokens = draft.tokens
    n = tokens.shape[1]
    parents = torch.tensor(draft.parents, device=tokens.device).expand_as(tokens).contiguous()
    if greedy:
        if scores.is_cuda:
            return verify_tree_greedy(tokens, parents, scores)
        return reference.verify_tree_greedy(tokens, parents, scores, None, n)
    given = tokens, parents, _drawn_from(draft, scores), _probs(scores), _uniforms(tokens, scores)
    if scores.is_cuda:
        return verify_tree(*given, replacement=False)
    return reference.verify_tree(*given, None, replacement=False, max_depth=n)


def _probs(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1)


def _uniforms(tokens: Tensor, scores: Tensor) -> Tensor:
    return torch.rand(tokens.shape[0], tokens.shape[1] + 1, device=scores.device)


def _drawn_from(draft: Draft, scores: Tensor) -> Tensor:
    """The draft's distributions; for tokens that were not drawn, all of the probability on them.

    Several children of one node that were not drawn would need a distribution each, and are refused.
    """
    if draft.probs is not None:
        return draft.probs
    if draft.parents is not None:
        raise ValueError("A tree for sampling needs the draft's probabilities: give Draft(probs=...), or a chain.")
    b, n = draft.tokens.shape
    one = torch.ones(b, n, 1, device=scores.device)
    return scores.new_zeros(b, n, scores.shape[-1]).scatter_(2, draft.tokens.clamp(min=0)[..., None], one)


def _tokens(after: Tensor) -> list[int]:
    found: list[int] = after.tolist()
    if min(found) < 0:
        raise ValueError("The scores of the next token are all -inf or NaN: the logits processors leave no token.")
    return found
