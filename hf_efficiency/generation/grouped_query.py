"""Multi-head into grouped-query attention by mean pooling (GQA, Ainslie et al. 2023, section 2.1).

Shape legend: h key-value heads before, k after, d head size, d_in.
"""

from torch import Tensor


def pool_heads(weight: Tensor, heads: int, groups: int) -> Tensor:
    """A projection with the mean of each group's heads.

    Args:
        weight: (h * d, d_in), or a bias (h * d,): a projection onto h heads of keys or values.
        heads: h.
        groups: k, which divides h. Neighbouring heads form a group, as query heads do.

    Returns:
        (k * d, d_in) or (k * d,), in the weight's dtype; the mean is computed in float32.

    Raises:
        ValueError: Heads that can't be grouped so.
    """
    if groups < 1 or heads % groups:
        raise ValueError(
            f"{heads} key-value heads can't form {groups} equal groups: choose num_key_value_heads among the divisors "
            f"of {heads}."
        )
    if weight.shape[0] % heads:
        raise ValueError(f"A projection of {weight.shape[0]} rows does not hold {heads} heads.")
    d = weight.shape[0] // heads
    pooled = weight.float().reshape(groups, heads // groups, d, -1).mean(1)
    return pooled.reshape(groups * d, *weight.shape[1:]).to(weight.dtype)
