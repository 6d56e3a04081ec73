"""Attention over dense and quantized caches: the kernels against their references, and both against torch."""

import pytest
import torch
from torch.nn import functional as F

from hf_efficiency.kernels.kv_attention import (
    Quantized,
    decode_attention,
    dequantize_keys,
    dequantize_values,
    kernel,
    op,
    quantize_keys,
    quantize_values,
    quantized_decode_attention,
    reference,
)
from tests.kernels.harness import DTYPES, TOLERANCES, assert_close, guarded, guards_intact, poisoned

# b, h, k, t, n, d: sizes that fill no block; one token; more rows than a block has; several ranges.
SHAPES = [
    (1, 4, 1, 1, 1, 32),
    (2, 6, 2, 3, 37, 80),
    (1, 1, 1, 16, 16, 128),
    (1, 5, 1, 13, 70, 96),
    (1, 2, 1, 1, 130, 256),
]


def cache_and_query(shape, dtype=torch.float32, seed=0):
    b, h, k, t, n, d = shape
    torch.manual_seed(seed)
    query = torch.randn(b, t, h, d).to(dtype).transpose(1, 2)  # as a model hands it over
    return query, *(guarded(torch.randn(b, k, n, d).to(dtype)) for _ in range(2))


def random_mask(b, h, t, n):
    """True almost everywhere, and nowhere for one query."""
    mask = torch.rand(b, h, t, n) > 0.2
    mask[0, 0, 0] = False
    return mask


def softmax_weights(query, key, mask):
    """(b, h, t, n), written with repeated heads."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query @ key.mT / query.shape[-1] ** 0.5
    return torch.softmax(logits.masked_fill(~mask, -torch.inf), -1)


def causal(t, n):
    return torch.ones(t, n, dtype=torch.bool).tril(n - t)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dense(shape, dtype):
    query, key, value = cache_and_query(shape, dtype)
    b, h, _, t, n, _ = shape
    mask = guarded(torch.randn(b, 1, t, n).to(dtype)) if h % 2 else None
    arguments = (query, key, value, mask, None, 0.3, 0.0, True, True)
    with poisoned():
        output, sums = kernel.decode_attention(*arguments)
    wanted, wanted_sums = reference.decode_attention(*arguments)
    assert_close(output, wanted)
    assert_close(sums, wanted_sums, 2e-5)
    assert guards_intact(key)
    assert guards_intact(value)


@pytest.mark.parametrize("slots", [1, 3])
def test_ranges_of_several_blocks(slots, monkeypatch):
    """One range of five blocks, and three ranges of two."""
    monkeypatch.setattr(kernel, "_slots", lambda device: slots)
    query, key, value = cache_and_query((1, 4, 2, 2, 300, 128))
    arguments = (query, key, value, None, None, 0.3, 0.0, True, True)
    with poisoned():
        output, sums = kernel.decode_attention(*arguments)
    wanted, wanted_sums = reference.decode_attention(*arguments)
    assert_close(output, wanted)
    assert_close(sums, wanted_sums)


@pytest.mark.parametrize(("blocks", "programs", "slots"), [(1, 1, 264), (64, 8, 264), (512, 8, 264), (512, 64, 264)])
def test_ranges_cover_all_blocks_and_fill_the_card(blocks, programs, slots):
    splits, per_split = kernel._shared_out(blocks, programs, slots)
    assert (splits - 1) * per_split < blocks <= splits * per_split
    assert programs * splits >= min(132, programs * blocks)


@pytest.mark.parametrize("heads", [1, 6])
def test_masks(heads):
    query, key, value = cache_and_query((2, 6, 2, 3, 37, 32))
    mask = random_mask(2, heads, 3, 37)
    arguments = (query, key, value, mask, None, 0.3, 0.0, True, True)
    with poisoned():
        output, sums = kernel.decode_attention(*arguments)
    wanted, wanted_sums = reference.decode_attention(*arguments)
    assert_close(output, wanted)
    assert_close(sums, wanted_sums)
    assert not output[0, 0, 0].any()
    for lowest in (-torch.inf, torch.finfo(torch.float32).min):
        additive = torch.zeros(mask.shape).masked_fill(~mask, lowest)
        output, sums = decode_attention(query, key, value, additive, 0.3)
        assert_close(output, wanted.transpose(1, 2))
        assert_close(sums, wanted_sums)


@pytest.mark.parametrize("run", [kernel.decode_attention, reference.decode_attention])
def test_attention_follows_torch(run):
    query, key, value = cache_and_query((2, 6, 2, 3, 21, 32))
    mask = random_mask(2, 1, 3, 21)
    mask[0, 0, 0, 3] = True  # torch gives NaN where nothing is seen
    both = mask & causal(3, 21)
    output, sums = run(query, key, value, mask, None, 32**-0.5, 0.0, True, True)
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=both, enable_gqa=True)
    assert_close(output.transpose(1, 2), wanted)
    assert_close(sums, softmax_weights(query, key, both).view(2, 2, 3, 3, 21).sum((2, 3)))
    seen, _ = run(query, key, value, mask, None, 32**-0.5, 0.0, False, False)
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    assert_close(seen.transpose(1, 2), wanted)


@pytest.mark.parametrize("run", [kernel.decode_attention, reference.decode_attention])
def test_softcap_and_sinks_follow_transformers(run):
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss

    query, key, value = cache_and_query((1, 4, 2, 2, 9, 32))
    module = torch.nn.Module().eval()
    module.num_key_value_groups, module.sinks, module.head_dim = 2, torch.randn(4), 32
    additive = torch.zeros(1, 1, 2, 9).masked_fill(~causal(2, 9), torch.finfo(torch.float32).min)
    wanted, weights = gemma(module, query, key, value, additive, scaling=0.9, softcap=1.5)
    output, sums = run(query, key, value, None, None, 0.9, 1.5, True, True)
    assert_close(output, wanted)
    assert_close(sums, weights.view(1, 2, 2, 2, 9).sum((2, 3)))
    wanted, weights = gpt_oss(module, query, key, value, additive, scaling=0.9)
    output, sums = run(query, key, value, None, module.sinks, 0.9, 0.0, True, True)
    assert_close(output, wanted)
    assert_close(sums, weights[..., :9].reshape(1, 2, 2, 2, 9).sum((2, 3)))


def test_left_padding_changes_nothing():
    """A sequence of 20 tokens behind 17 of padding gives what it gives alone, and padding gets no attention."""
    query, key, value = cache_and_query((2, 4, 2, 2, 37, 32))
    mask = torch.ones(2, 1, 2, 37, dtype=torch.bool)
    mask[1, :, :, :17] = False
    key[1, :, :17] = 50.0
    output, sums = decode_attention(query, key, value, mask & causal(2, 37))
    for row, start in ((0, 0), (1, 17)):
        alone, its_sums = decode_attention(query[row, None], key[row, None, :, start:], value[row, None, :, start:])
        assert_close(output[row, None], alone)
        assert_close(sums[row, None, :, start:], its_sums)
    assert not sums[1, :, :17].any()


def test_an_empty_cache_and_an_empty_batch_give_zeros():
    query = torch.randn(2, 4, 1, 32)
    nothing = torch.zeros(2, 2, 0, 32)
    with poisoned():
        output, sums = decode_attention(query, nothing, nothing, is_causal=False)
    assert not output.any()
    assert sums.shape == (2, 2, 0)
    output, sums = decode_attention(query[:0], torch.zeros(0, 2, 5, 32), torch.zeros(0, 2, 5, 32))
    assert output.shape == (0, 4, 1, 32)
    assert sums.shape == (0, 2, 5)


def test_strides_and_repeatability():
    """A cache (b, n, k, d) in memory, one whose last stride is not 1, and bitwise the same result twice."""
    query, key, value = cache_and_query((2, 4, 2, 2, 37, 32))
    wanted, wanted_sums = decode_attention(query, key, value)
    apart = key.transpose(1, 2).contiguous().transpose(1, 2), value.mT.contiguous().mT
    output, sums = decode_attention(query, *apart)
    assert torch.equal(output, wanted)
    assert torch.equal(sums, wanted_sums)
    plain, none = decode_attention(query, key, value, with_sums=False)
    assert torch.equal(plain, wanted)
    assert none is None
    assert output.transpose(1, 2).is_contiguous()


def test_layout_by_hand():
    """Two bits, ranges 0 to 3 and -3 to 3: codes and words worked out with pen and paper."""
    channel = torch.tensor([0.0, 1, 2, 3] * 4)
    keys = torch.stack((channel, 2 * channel - 3), -1).view(1, 1, 16, 2)
    word = sum(code << (2 * i) for i, code in enumerate([0, 1, 2, 3] * 4)) - 2**32
    made = quantize_keys(keys, 2, 16)
    assert made.codes.tolist() == [[[[word, word]]]]
    assert made.ranges.tolist() == [[[[[1.0, 0.0], [2.0, -3.0]]]]]
    assert torch.equal(dequantize_keys(made), keys)
    made = quantize_values(keys.mT.contiguous(), 2, 16)
    assert made.codes.tolist() == [[[[word], [word]]]]
    assert made.ranges.tolist() == [[[[[1.0, 0.0]], [[2.0, -3.0]]]]]
    assert torch.equal(dequantize_values(made), keys.mT)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_quantization_error_is_half_a_step(bits, dtype):
    x = torch.randn(2, 3, 64, 96)
    x[0, 0] = 1.25  # a constant group has no step
    for quantize, dequantize, dim, group in (
        (quantize_keys, dequantize_keys, 2, 32),
        (quantize_values, dequantize_values, 3, 16),
    ):
        made = quantize(x, bits, group, dtype)
        step = made.ranges[..., 0].float().repeat_interleave(group, dim)
        # a scale and a minimum of 16 bits are off by 2**-11 of themselves
        slack = 1e-5 if dtype == torch.float32 else 2**-11 * x.abs().max() * 4
        assert ((dequantize(made) - x).abs() <= step * 0.5 + slack).all()
        assert torch.equal(dequantize(made)[0, 0], torch.full((64, 96), 1.25))


def quantized_case(shape, key_bits, value_bits, groups, residual, dtype=torch.float32, ranges=torch.float16):
    query, key, value = cache_and_query(shape, dtype)
    packed = shape[4] - residual
    keys = quantize_keys(key[:, :, :packed], key_bits, groups[0], ranges)
    values = quantize_values(value[:, :, :packed], value_bits, groups[1], ranges)
    keys = Quantized(guarded(keys.codes), guarded(keys.ranges), key_bits)
    values = Quantized(guarded(values.codes), guarded(values.ranges), value_bits)
    return query, keys, values, key[:, :, packed:], value[:, :, packed:]


QUANTIZED = [
    # shape, bits of keys and values, group sizes, residual
    ((1, 4, 1, 1, 96, 64), 2, 2, (32, 32), 0),
    ((2, 4, 2, 2, 75, 80), 4, 2, (16, 16), 11),
    ((1, 3, 1, 3, 389, 128), 2, 4, (128, 64), 5),
    ((1, 2, 2, 1, 65, 32), 8, 8, (64, 32), 1),
    ((1, 2, 1, 2, 300, 256), 8, 4, (256, 128), 44),
]


@pytest.mark.parametrize(("shape", "key_bits", "value_bits", "groups", "residual"), QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized(shape, key_bits, value_bits, groups, residual, dtype):
    ranges = torch.float32 if dtype == torch.float32 else torch.float16
    case = quantized_case(shape, key_bits, value_bits, groups, residual, dtype, ranges)
    query, keys, values, *rest = case
    arguments = (query, *keys[:2], *values[:2], *rest, None, None, key_bits, value_bits, 0.2, 0.0, True, True)
    with poisoned():
        output, sums = kernel.quantized_decode_attention(*arguments)
    wanted, wanted_sums = reference.quantized_decode_attention(*arguments)
    assert_close(output, wanted)
    # keys and weights round to the dtype in different places
    assert_close(sums, wanted_sums, TOLERANCES[dtype])
    assert all(map(guards_intact, (*keys[:2], *values[:2])))


def test_quantized_follows_the_dense_cache(monkeypatch):
    """Masks, soft cap and sinks, ranges of several blocks, and strides of a larger cache."""
    monkeypatch.setattr(kernel, "_slots", lambda device: 4)
    query, keys, values, residual_key, residual_value = quantized_case((2, 4, 2, 2, 299, 128), 4, 4, (32, 32), 11)
    dense = (
        torch.cat((dequantize_keys(keys), residual_key), 2),
        torch.cat((dequantize_values(values), residual_value), 2),
    )
    options = {"mask": random_mask(2, 1, 2, 299), "softcap": 3.0, "sinks": torch.randn(4)}
    wanted, wanted_sums = decode_attention(query, *dense, **options)
    roomy = Quantized(
        F.pad(keys.codes, (0, 0, 0, 9))[:, :, : keys.codes.shape[2]],
        F.pad(keys.ranges, (0, 0, 0, 0, 0, 9))[:, :, : keys.ranges.shape[2]],
        4,
    )
    output, sums = quantized_decode_attention(query, roomy, values, residual_key, residual_value, **options)
    assert_close(output, wanted)
    assert_close(sums, wanted_sums)
    plain, none = quantized_decode_attention(
        query, keys, values, residual_key, residual_value, with_sums=False, **options
    )
    assert torch.equal(plain, output)
    assert none is None


def test_only_a_residual_and_no_residual():
    query, key, value = cache_and_query((1, 4, 2, 1, 32, 32))
    empty = quantize_keys(key[:, :, :0], 2), quantize_values(value[:, :, :0], 2)
    output, _ = quantized_decode_attention(query, *empty, key, value)
    assert torch.equal(output, decode_attention(query, key, value)[0])
    full = quantize_keys(key, 8), quantize_values(value, 8)
    output, _ = quantized_decode_attention(query, *full)
    assert_close(output, decode_attention(query, dequantize_keys(full[0]), dequantize_values(full[1]))[0])


def test_operators_are_sound():
    """Schema and fake tensors, as torch itself checks them."""
    query, key, value = cache_and_query((1, 4, 2, 2, 37, 32))
    mask = random_mask(1, 1, 2, 37)
    for with_sums in (True, False):
        torch.library.opcheck(
            op._decode_attention, (query, key, value, mask, torch.zeros(4), 0.1, 0.0, True, with_sums)
        )
    query, keys, values, *rest = quantized_case((1, 4, 2, 1, 33, 32), 2, 4, (32, 32), 1)
    arguments = (query, *keys[:2], *values[:2], *rest, None, None, 2, 4, 0.1, 0.0, True, True)
    torch.library.opcheck(op._quantized_decode_attention, arguments)


def test_torch_compile_traces_through():
    query, keys, values, *rest = quantized_case((1, 4, 2, 1, 33, 32), 2, 4, (32, 32), 1)

    def both(query, keys, values, key, value):
        dense, _ = decode_attention(query, key, value, softcap=2.0)
        quantized, sums = quantized_decode_attention(query, keys, values, key, value)
        return dense + quantized, sums

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    wanted = both(query, keys, values, *rest)
    for actual, expected in zip(compiled(query, keys, values, *rest), wanted, strict=True):
        assert_close(actual, expected)


def test_there_is_no_gradient():
    query, key, value = cache_and_query((1, 2, 1, 1, 5, 32))
    output, _ = decode_attention(query.requires_grad_(), key, value)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        output.sum().backward()


def test_bad_input_is_named():
    query, key = torch.zeros(1, 4, 2, 32), torch.zeros(1, 2, 6, 32)
    with pytest.raises(ValueError, match=r"key has shape \(1, 2, 6, 32\), value \(1, 2, 5, 32\)"):
        decode_attention(query, key, key[:, :, :5])
    with pytest.raises(ValueError, match="query has 3 dimensions and key 4"):
        decode_attention(query[0], key, key)
    with pytest.raises(ValueError, match=r"query is torch.float64: cast it"):
        decode_attention(query.double(), key, key)
    with pytest.raises(ValueError, match=r"query is torch.float32 and key torch.float16"):
        decode_attention(query, key.half(), key.half())
    with pytest.raises(ValueError, match="query lies on cpu and key on meta"):
        decode_attention(query, key.to("meta"), key.to("meta"))
    with pytest.raises(ValueError, match=r"query has shape \(1, 3, 2, 32\), key \(1, 2, 6, 32\)"):
        decode_attention(query[:, :3], key, key)
    with pytest.raises(ValueError, match="The head size is 512: at most 256"):
        decode_attention(torch.zeros(1, 2, 1, 512), torch.zeros(1, 2, 1, 512), torch.zeros(1, 2, 1, 512))
    with pytest.raises(ValueError, match="query has 2 tokens, the cache 1"):
        decode_attention(query, key[:, :, :1], key[:, :, :1])
    with pytest.raises(ValueError, match=r"mask has shape \(1, 1, 2, 5\): it must be \(1 or 1, 4 or 1, 2, 6\)"):
        decode_attention(query, key, key, torch.zeros(1, 1, 2, 5))
    with pytest.raises(ValueError, match=r"mask is torch.int64"):
        decode_attention(query, key, key, torch.zeros(1, 1, 2, 6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"sinks is torch.float32 of shape \(3,\)"):
        decode_attention(query, key, key, sinks=torch.zeros(3))
    with pytest.raises(ValueError, match="softcap is 0"):
        decode_attention(query, key, key, softcap=0.0)


def test_bad_quantized_input_is_named():
    query, x = torch.zeros(1, 4, 1, 32), torch.zeros(1, 2, 64, 32)
    keys, values = quantize_keys(x, 2), quantize_values(x, 2)
    with pytest.raises(ValueError, match="bits is 3: choose 2, 4 or 8"):
        quantize_keys(x, 3)
    with pytest.raises(ValueError, match="The group size is 48"):
        quantize_keys(x, 2, 48)
    with pytest.raises(ValueError, match="keys hold 60 tokens, the group size is 32: leave the last 28 out"):
        quantize_keys(x[:, :, :60], 2)
    with pytest.raises(ValueError, match="head size 32, the group size is 64"):
        quantize_values(x, 2, 64)
    with pytest.raises(ValueError, match=r"Scales and minima are torch.bfloat16"):
        quantize_values(x, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"keys has torch.int64 codes"):
        quantized_decode_attention(query, keys._replace(codes=keys.codes.long()), values)
    with pytest.raises(ValueError, match="keys have batch 1 and head size 32"):
        quantized_decode_attention(torch.zeros(1, 4, 1, 64), keys, values)
    with pytest.raises(ValueError, match=r"keys hold \(1, 2, 64, 32\) numbers and values"):
        quantized_decode_attention(query, keys, quantize_values(x, 4)._replace(bits=2))
    with pytest.raises(ValueError, match=r"keys has ranges of shape \(1, 1, 2, 32, 2\): \(1, 2, 2, 32, 2\) is needed"):
        quantized_decode_attention(query, keys._replace(ranges=keys.ranges[:, :1]), values)
    with pytest.raises(ValueError, match="residual_key is given alone"):
        quantized_decode_attention(query, keys, values, x)
    with pytest.raises(ValueError, match=r"residual_key has shape \(1, 2, 64, 32\), residual_value \(1, 2, 2, 32\)"):
        quantized_decode_attention(query, keys, values, x, x[:, :, :2])
    with pytest.raises(ValueError, match="residual_key has 1 heads, the quantized cache 2"):
        quantized_decode_attention(query, keys, values, x[:, :1], x[:, :1])
