"""The operators: checked arguments and meta implementations. There are no gradients: they are for generation.

Shape legend: b batch, h query heads, k key-value heads, t query tokens, n cached tokens, r residual tokens, d head
size.
"""

from typing import Any

import torch
from torch import Tensor

from ._launch import namespace, run
from .reference import Quantized, check_layout

_NAMESPACE = namespace(__package__)
_LARGEST_HEAD = 256


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    is_causal: bool = True,
    with_sums: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a few new tokens over a key-value cache, and how much attention each cached key received.

    One pass over keys and values, split over their tokens (Flash-Decoding, Dao et al. 2023). The sums are what H2O
    (Zhang et al. 2023) keeps keys by. They need the normaliser of a whole row, so the pass leaves its logits behind,
    h * t * n float32 (a part h t / (k d) of a 16-bit cache's bytes), and the small kernel that joins the splits turns
    them into attention. There are no gradients: `backward` raises.

    Args:
        query: (b, h, t, d), d at most 256. Any strides. t is small: nothing is saved over the queries.
        key: (b, k, n, d), h a multiple of k, of the query's dtype: float16, bfloat16 or float32. Copied where its last
            stride is not 1.
        value: (b, k, n, d), likewise.
        mask: (b or 1, h or 1, t, n). Boolean: True where a query attends. Floating: added to the logits; its dtype's
            lowest number masks out, like -inf. It narrows what `is_causal` leaves.
        scale: Of the logits, 1 / sqrt(d) by default.
        softcap: Logits become softcap * tanh(logits / softcap), as in Gemma 2.
        sinks: (h,) a further logit of each head, without a value, as in gpt-oss.
        is_causal: The queries are the last t of the n tokens. With False, the mask alone says what is seen.
        with_sums: Whether to return the attention of the keys.

    Returns:
        The output (b, h, t, d), which lies in memory as (b, t, h, d), and the attention that each key received, summed
        over the t queries and the h / k heads of its key-value head, (b, k, n) float32, or None. A query that sees no
        key gets zeros and gives no attention.

    Raises:
        ValueError: Shapes, dtypes or devices that don't match.
    """
    if key.shape != value.shape:
        raise ValueError(f"key has shape {tuple(key.shape)}, value {tuple(value.shape)}: they must be alike.")
    for name, x in (("key", key), ("value", value)):
        _check_cache(query, name, x)
    _check_rest(query, key.shape[1], key.shape[2], mask, sinks, is_causal)
    scale, cap = _numbers(query, scale, softcap)
    output, sums = _decode_attention(query, key, value, mask, sinks, scale, cap, is_causal, with_sums)
    return output.transpose(1, 2), sums if with_sums else None


def quantized_decode_attention(
    query: Tensor,
    keys: Quantized,
    values: Quantized,
    residual_key: Tensor | None = None,
    residual_value: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    is_causal: bool = True,
    with_sums: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`decode_attention` over a cache quantized as in KIVI (Liu et al. 2024), dequantized in registers.

    Args:
        query: (b, h, t, d), d at most 256 and a multiple of 16.
        keys: The oldest tokens' keys (b, k, n, d), as `quantize_keys` stores them.
        values: Their values, as `quantize_values` stores them. Bits and group sizes may differ from the keys'.
        residual_key: (b, k, r, d) the tokens after them, in the query's dtype: those that fill no group yet.
        residual_value: (b, k, r, d).
        mask: As for `decode_attention`, over the n + r tokens.
        scale: As for `decode_attention`, like all that follows.
        softcap: See there.
        sinks: See there.
        is_causal: See there.
        with_sums: See there.

    Returns:
        As `decode_attention`, over n + r tokens.

    Raises:
        ValueError: Shapes, dtypes, devices, bits or group sizes that don't match.
    """
    kv_heads, n, d = _check_quantized(query, keys, values)
    residual_key, residual_value = _residual(query, kv_heads, d, residual_key, residual_value)
    _check_rest(query, kv_heads, n + residual_key.shape[2], mask, sinks, is_causal)
    scale, cap = _numbers(query, scale, softcap)
    if n == 0:
        output, sums = _decode_attention(
            query, residual_key, residual_value, mask, sinks, scale, cap, is_causal, with_sums
        )
    else:
        output, sums = _quantized_decode_attention(
            query, *keys[:2], *values[:2], residual_key, residual_value, mask, sinks, keys.bits, values.bits,
            scale, cap, is_causal, with_sums,
        )  # fmt: skip
    return output.transpose(1, 2), sums if with_sums else None


def _residual(
    query: Tensor, kv_heads: int, d: int, residual_key: Tensor | None, residual_value: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The dense tokens, of which there may be none, or a ValueError."""
    if (residual_key is None) != (residual_value is None):
        given = "residual_value" if residual_key is None else "residual_key"
        raise ValueError(f"{given} is given alone: give residual_key and residual_value, or neither.")
    if residual_key is None or residual_value is None:
        residual_key = residual_value = query.new_empty(query.shape[0], kv_heads, 0, d)
    if residual_key.shape != residual_value.shape:
        raise ValueError(
            f"residual_key has shape {tuple(residual_key.shape)}, residual_value {tuple(residual_value.shape)}: they "
            "must be alike."
        )
    for name, x in (("residual_key", residual_key), ("residual_value", residual_value)):
        _check_cache(query, name, x)
    if residual_key.shape[1] != kv_heads:
        raise ValueError(f"residual_key has {residual_key.shape[1]} heads, the quantized cache {kv_heads}.")
    return residual_key, residual_value


def _numbers(query: Tensor, scale: float | None, softcap: float | None) -> tuple[float, float]:
    """Scale and soft cap as the operators take them."""
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}: give a positive number, or None for none.")
    return float(query.shape[-1] ** -0.5 if scale is None else scale), float(softcap or 0.0)


def _check_cache(query: Tensor, name: str, x: Tensor) -> None:
    """ValueError unless the query can attend to x (b, k, n, d)."""
    if query.ndim != 4 or x.ndim != 4:
        raise ValueError(
            f"query has {query.ndim} dimensions and {name} {x.ndim}: both need (batch, heads, tokens, size)."
        )
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"query is {query.dtype}: cast it to float16, bfloat16 or float32.")
    if x.dtype != query.dtype:
        raise ValueError(f"query is {query.dtype} and {name} {x.dtype}: cast one of them.")
    _check_device(query, name, x)
    b, h, _, d = query.shape
    if x.shape[0] != b or x.shape[3] != d or x.shape[1] == 0 or h % x.shape[1]:
        raise ValueError(
            f"query has shape {tuple(query.shape)}, {name} {tuple(x.shape)}: batch and head size must be alike, and "
            "the query's heads a multiple of the cache's."
        )
    if not 0 < d <= _LARGEST_HEAD:
        raise ValueError(f"The head size is {d}: at most {_LARGEST_HEAD} fits.")


def _check_rest(
    query: Tensor, kv_heads: int, n: int, mask: Tensor | None, sinks: Tensor | None, is_causal: bool
) -> None:
    """ValueError unless mask and sinks fit a query over a cache of n tokens."""
    b, h, t, _ = query.shape
    if is_causal and n < t:
        raise ValueError(f"query has {t} tokens, the cache {n}: it must hold the query's own tokens where is_causal.")
    if mask is not None:
        _check_device(query, "mask", mask)
        if mask.dtype not in (torch.bool, torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"mask is {mask.dtype}: cast it to bool, float16, bfloat16 or float32.")
        if mask.ndim != 4 or mask.shape[0] not in (1, b) or mask.shape[1] not in (1, h) or mask.shape[2:] != (t, n):
            raise ValueError(f"mask has shape {tuple(mask.shape)}: it must be ({b} or 1, {h} or 1, {t}, {n}).")
    if sinks is not None:
        _check_device(query, "sinks", sinks)
        if sinks.shape != (h,) or not sinks.is_floating_point():
            raise ValueError(
                f"sinks is {sinks.dtype} of shape {tuple(sinks.shape)}: one floating number a head, ({h},)."
            )


def _check_quantized(query: Tensor, keys: Quantized, values: Quantized) -> tuple[int, int, int]:
    """Heads, tokens and head size of a quantized cache, or a ValueError."""
    for name, x in (("keys", keys), ("values", values)):
        if x.codes.ndim != 4 or x.ranges.ndim != 5 or x.ranges.shape[4] != 2 or x.codes.dtype != torch.int32:
            raise ValueError(
                f"{name} has {x.codes.dtype} codes of shape {tuple(x.codes.shape)} and ranges of shape "
                f"{tuple(x.ranges.shape)}: see `Quantized` for the layout."
            )
        check_layout(x.bits, 32, x.ranges.dtype)
        _check_device(query, f"{name}.codes", x.codes)
        _check_device(query, f"{name}.ranges", x.ranges)
    b, kv_heads, words, d = keys.codes.shape
    n = words * 32 // keys.bits
    if query.ndim != 4 or (query.shape[0], query.shape[3]) != (b, d):
        raise ValueError(f"query has shape {tuple(query.shape)}, keys have batch {b} and head size {d}.")
    if values.codes.shape != (b, kv_heads, n, d * values.bits // 32) or d % 16:
        raise ValueError(
            f"keys hold {(b, kv_heads, n, d)} numbers and values have codes of shape {tuple(values.codes.shape)}: "
            f"values need {(b, kv_heads, n)} and {d * values.bits / 32:g} words, d a multiple of 16."
        )
    if n:
        groups = keys.ranges.shape[2], values.ranges.shape[3]
        _check_groups("keys", keys.ranges, (b, kv_heads, groups[0], d, 2), n, groups[0])
        _check_groups("values", values.ranges, (b, kv_heads, n, groups[1], 2), d, groups[1])
    return kv_heads, n, d


def _check_groups(name: str, ranges: Tensor, shape: tuple[int, ...], size: int, groups: int) -> None:
    """ValueError unless `groups` equal groups of a size that the layout has make up `size`."""
    if ranges.shape != shape or groups == 0 or size % groups:
        raise ValueError(
            f"{name} has ranges of shape {tuple(ranges.shape)}: {shape} is needed, {groups} dividing {size}."
        )
    check_layout(2, size // groups, ranges.dtype)


def _check_device(query: Tensor, name: str, x: Tensor) -> None:
    """ValueError unless query and x lie on one device."""
    if x.device != query.device:
        raise ValueError(f"query lies on {query.device} and {name} on {x.device}: move them to one device.")


@torch.library.custom_op(f"{_NAMESPACE}::decode_attention", mutates_args=())
def _decode_attention(
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
    made: tuple[Tensor, Tensor] = run(
        __package__, "decode_attention", query, key, value, mask, sinks, scale, softcap, is_causal, with_sums
    )
    return made


@_decode_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake(query, key.shape[1], key.shape[2], rest[-1])


@torch.library.custom_op(f"{_NAMESPACE}::quantized_decode_attention", mutates_args=())
def _quantized_decode_attention(
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
    made: tuple[Tensor, Tensor] = run(
        __package__, "quantized_decode_attention", query, key_codes, key_ranges, value_codes, value_ranges,
        residual_key, residual_value, mask, sinks, key_bits, value_bits, scale, softcap, is_causal, with_sums,
    )  # fmt: skip
    return made


@_quantized_decode_attention.register_fake
def _(
    query: Tensor, key_codes: Tensor, key_ranges: Tensor, value_codes: Tensor, value_ranges: Tensor,
    residual_key: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _fake(query, key_codes.shape[1], value_codes.shape[2] + residual_key.shape[2], rest[-1])


def _fake(query: Tensor, kv_heads: int, n: int, with_sums: bool) -> tuple[Tensor, Tensor]:
    b, h, t, d = query.shape
    sums = (b, kv_heads, n) if with_sums else (0,)
    return query.new_empty(b, t, h, d), query.new_empty(sums, dtype=torch.float32)
