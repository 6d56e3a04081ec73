"""Attention that also says how much attention each key received, over blocks of queries."""

from torch import Tensor

from hf_efficiency.generation.caches.slots import for_heads
from hf_efficiency.kernels.kv_attention import decode_attention

# Logits of one block of queries: 256 MB in float32.
_BLOCK_NUMBERS = 2**26


def query_blocks(query: Tensor, key: Tensor, first: int = 0, last: int | None = None) -> list[tuple[int, int]]:
    """Start and end of blocks of queries first to last whose logits fit into memory.

    Args:
        query: (b, h, t, d).
        key: (b, k, n, d).
        first: The first query.
        last: The one after the last; all by default.
    """
    b, h, t, _ = query.shape
    size = max(1, _BLOCK_NUMBERS // max(1, b * h * key.shape[2]))
    end = t if last is None else last
    return [(i, min(i + size, end)) for i in range(first, end, size)]


def attention_with_sums(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of each query, and the attention of each key summed over queries and the heads of its group.

    Args:
        query: (b, h, t, d).
        key: (b, k, n, d), h a multiple of k.
        value: (b, k, n, d_v).
        mask: (b, k or h, t, n), boolean or additive.
        scale: Of the logits.

    Returns:
        Output (b, t, h, d_v) and sums (b, k, n) in float32.
    """
    mask = for_heads(mask, query.shape[1])
    output, sums = decode_attention(query, key, value, mask, scale, is_causal=False)
    if sums is None:
        raise RuntimeError("decode_attention gave no sums.")
    return output.transpose(1, 2), sums
