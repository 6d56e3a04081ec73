"""Plain torch: the truth in tests, what runs without a kernel, and the layout of a quantized cache.

Shape legend: b batch, h query heads, k key-value heads, t query tokens, n cached tokens, r residual tokens, d head
size, g group size, c codes an int32 (32 / bits).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Quantized(NamedTuple):
    """Keys or values in the layout of KIVI (Liu et al. 2024, section 3): asymmetric, x ≈ code * scale + minimum.

    Codes are unsigned; code i of an int32 lies in its bits [i * bits, (i + 1) * bits). A group's scale and minimum lie
    side by side, so that one load fetches both: `ranges[..., 0]` is the scale, `ranges[..., 1]` the minimum.

    Attributes:
        codes: int32, c = 32 / bits codes each. Keys (b, k, n / c, d): c consecutive tokens of one channel. Values
            (b, k, n, d / c): c consecutive channels of one token.
        ranges: float16 or float32. Keys (b, k, n / g, d, 2): a group is g consecutive tokens of one channel. Values
            (b, k, n, d / g, 2): g consecutive channels of one token.
        bits: 2, 4 or 8.
    """

    codes: Tensor
    ranges: Tensor
    bits: int


def quantize_keys(keys: Tensor, bits: int, group_size: int = 32, dtype: torch.dtype = torch.float16) -> Quantized:
    """Quantizes keys per channel, in groups of consecutive tokens (KIVI, section 3).

    Args:
        keys: (b, k, n, d), n a multiple of the group size.
        bits: 2, 4 or 8.
        group_size: Tokens: a power of two from 16 to 256.
        dtype: Of scales and minima, float16 or float32.

    Raises:
        ValueError: Sizes, bits or dtypes that the layout doesn't have.
    """
    b, k, n, d = keys.shape
    check_layout(bits, group_size, dtype)
    if n % group_size:
        raise ValueError(f"keys hold {n} tokens, the group size is {group_size}: leave the last {n % group_size} out.")
    codes, ranges = _quantize(keys.reshape(b, k, n // group_size, group_size, d), 3, bits, dtype)
    words = _pack(codes.reshape(b, k, n * bits // 32, 32 // bits, d), 3, bits)
    return Quantized(words, ranges.reshape(b, k, n // group_size, d, 2), bits)


def quantize_values(values: Tensor, bits: int, group_size: int = 32, dtype: torch.dtype = torch.float16) -> Quantized:
    """Quantizes values per token, in groups of consecutive channels (KIVI, section 3).

    Args:
        values: (b, k, n, d), d a multiple of the group size.
        bits: 2, 4 or 8.
        group_size: Channels: a power of two from 16 to 256.
        dtype: Of scales and minima, float16 or float32.

    Raises:
        ValueError: Sizes, bits or dtypes that the layout doesn't have.
    """
    b, k, n, d = values.shape
    check_layout(bits, group_size, dtype)
    if d % group_size:
        raise ValueError(f"values have head size {d}, the group size is {group_size}: choose one that divides it.")
    codes, ranges = _quantize(values.reshape(b, k, n, d // group_size, group_size), 4, bits, dtype)
    words = _pack(codes.reshape(b, k, n, d * bits // 32, 32 // bits), 4, bits)
    return Quantized(words, ranges.reshape(b, k, n, d // group_size, 2), bits)


def dequantize_keys(keys: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The (b, k, n, d) keys that `quantize_keys` stored, computed in float32 and rounded to `dtype`."""
    b, k, words, d = keys.codes.shape
    n, groups = words * 32 // keys.bits, keys.ranges.shape[2]
    codes = _unpack(keys.codes, 3, keys.bits).reshape(b, k, groups, n // max(groups, 1), d)
    scale, minimum = (x.unsqueeze(3).float() for x in keys.ranges.unbind(-1))
    return (codes * scale + minimum).to(dtype).reshape(b, k, n, d)


def dequantize_values(values: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The (b, k, n, d) values that `quantize_values` stored, computed in float32 and rounded to `dtype`."""
    b, k, n, words = values.codes.shape
    d, groups = words * 32 // values.bits, values.ranges.shape[3]
    codes = _unpack(values.codes, 4, values.bits).reshape(b, k, n, groups, d // groups)
    scale, minimum = (x.unsqueeze(4).float() for x in values.ranges.unbind(-1))
    return (codes * scale + minimum).to(dtype).reshape(b, k, n, d)


def check_layout(bits: int, group_size: int, dtype: torch.dtype) -> None:
    """ValueError unless a quantized cache can have these bits, this group size and this dtype of its ranges."""
    if bits not in (2, 4, 8):
        raise ValueError(f"bits is {bits}: choose 2, 4 or 8.")
    if group_size not in (16, 32, 64, 128, 256):
        raise ValueError(f"The group size is {group_size}: choose 16, 32, 64, 128 or 256.")
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"Scales and minima are {dtype}: choose float16 or float32.")


def _quantize(x: Tensor, dim: int, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of x and the scale and minimum of each group along `dim`, codes computed with both as they are stored."""
    x = x.float()
    low, high = x.aminmax(dim=dim, keepdim=True)
    scale, low = ((high - low) / (2**bits - 1)).to(dtype), low.to(dtype)
    inverse = torch.where(scale > 0, 1 / scale.float(), 0.0)
    codes = ((x - low.float()) * inverse).round().clamp(0, 2**bits - 1).int()
    return codes, torch.stack((scale, low), -1)


def _pack(codes: Tensor, dim: int, bits: int) -> Tensor:
    """Packs dimension `dim`, 32 / bits codes long, into int32, and drops it."""
    shape = [1] * codes.ndim
    shape[dim] = -1
    shifts = torch.arange(0, 32, bits, device=codes.device).view(shape)
    return (codes.long() << shifts).sum(dim).int()


def _unpack(words: Tensor, dim: int, bits: int) -> Tensor:
    """The inverse of `_pack`, in float32."""
    words = words.unsqueeze(dim)
    shape = [1] * words.ndim
    shape[dim] = -1
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32).view(shape)
    return ((words >> shifts) & (2**bits - 1)).float()


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    is_causal: bool,
    with_sums: bool,
) -> tuple[Tensor, Tensor]:
    """Attention in float32, rounded once.

    Args:
        query: (b, h, t, d).
        key: (b, k, n, d).
        value: (b, k, n, d).
        mask: (b or 1, h or 1, t, n), boolean or additive.
        sinks: (h,), a further logit of each head that has no value.
        scale: Of the logits.
        softcap: Logits become softcap * tanh(logits / softcap); 0 for none.
        is_causal: The queries are the last t of the n tokens.
        with_sums: Whether to return the sums; they are empty otherwise.

    Returns:
        Output (b, t, h, d), and each key's attention (b, k, n) float32, summed over the queries and heads of its group.
    """
    b, h, t, d = query.shape
    k, n = key.shape[1:3]
    grouped = query.float().reshape(b, k, h // k, t, d)
    logits = (torch.einsum("bkgtd,bknd->bkgtn", grouped, key.float()) * scale).reshape(b, h, t, n)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if is_causal:
        logits = logits.masked_fill(_future(t, n, query.device), -torch.inf)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        logits = torch.where(mask > torch.finfo(mask.dtype).min, logits + mask.float(), -torch.inf)
    if sinks is not None:
        logits = torch.cat((logits, sinks.float().view(1, h, 1, 1).expand(b, h, t, 1)), -1)
    weights = torch.softmax(logits, -1).nan_to_num(0.0)[..., :n].reshape(b, k, h // k, t, n)
    output = torch.einsum("bkgtn,bknd->btkgd", weights, value.float()).reshape(b, t, h, d)
    sums = weights.sum((2, 3)) if with_sums else weights.new_empty(0)
    return output.to(query.dtype), sums


def _future(t: int, n: int, device: torch.device) -> Tensor:
    """(t, n): whether a token comes after a query, where the queries are the last t of n tokens."""
    return torch.arange(n, device=device) > torch.arange(n - t, n, device=device)[:, None]


def quantized_decode_attention(
    query: Tensor,
    key_codes: Tensor,
    key_ranges: Tensor,
    value_codes: Tensor,
    value_ranges: Tensor,
    residual_key: Tensor,
    residual_value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    key_bits: int,
    value_bits: int,
    scale: float,
    softcap: float,
    is_causal: bool,
    with_sums: bool,
) -> tuple[Tensor, Tensor]:
    """`decode_attention` over the dequantized cache and, after it, the residual (b, k, r, d)."""
    keys = dequantize_keys(Quantized(key_codes, key_ranges, key_bits), query.dtype)
    values = dequantize_values(Quantized(value_codes, value_ranges, value_bits), query.dtype)
    key, value = torch.cat((keys, residual_key), 2), torch.cat((values, residual_value), 2)
    return decode_attention(query, key, value, mask, sinks, scale, softcap, is_causal, with_sums)
