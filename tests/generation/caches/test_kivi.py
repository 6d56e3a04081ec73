"""KIVI's layout: numbers worked out by hand, groups of padded rows, and that stored codes never change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_efficiency.generation.caches.kivi import KiviStore, unpack_keys, unpack_values, value_group
from hf_efficiency.kernels.kv_attention import dequantize_keys, dequantize_values, quantize_keys, quantize_values


def store(b=1, bits=4, window=8, k=2, d=32, group=16):
    empty = torch.empty(b, k, 0, d)
    return KiviStore(empty, empty, bits, group, window)


def test_two_bits_by_hand():
    """Keys: the tokens of a channel from 0 to 3 hit all four codes; values: the channels of a token do."""
    ramp = torch.arange(16.0) / 5  # 0 to 3: codes are the nearest whole numbers
    keys = ramp.view(1, 1, 16, 1).expand(1, 1, 16, 16)
    found = unpack_keys(quantize_keys(keys, 2, 16), torch.float32)
    assert torch.equal(found[0, 0, :, 3], ramp.round())
    found = unpack_values(quantize_values(keys.mT.contiguous(), 2, 16), torch.float32)
    assert torch.equal(found[0, 0, 3], ramp.round())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacking_is_that_of_the_kernel_project(bits, dtype):
    x = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(bits))
    keys, values = quantize_keys(x, bits, 32), quantize_values(x, bits, 16)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(unpack_keys(keys, dtype), dequantize_keys(keys, dtype), **tolerance)
    torch.testing.assert_close(unpack_values(values, dtype), dequantize_values(values, dtype), **tolerance)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.lists(st.integers(0, 20), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_any_cutting_and_padding_quantizes_a_row_as_alone(sizes, pads):
    """Each row's tokens are those of the row alone, whatever its padding and however they came."""
    total = sum(sizes)
    pads = [min(pad, sizes[0] - 1) for pad in pads]
    x = torch.randn(len(pads), 1, total, 32, generator=torch.Generator().manual_seed(total))
    batch = store(len(pads), k=1)
    start = 0
    for i, size in enumerate(sizes):
        batch.append(x[:, :, start : start + size], -x[:, :, start : start + size])
        if i == 0:
            batch.pads = list(pads)
        batch.flush()
        start += size
    keys, values = batch.dense()
    assert keys.shape == x.shape
    for row, pad in enumerate(pads):
        text = x[row : row + 1, :, pad:]
        count = max(0, (text.shape[2] - 8) // 16)
        assert batch.groups[row] == count
        old = unpack_keys(quantize_keys(text[:, :, : count * 16], 4, 16), torch.float32)
        assert torch.equal(keys[row : row + 1, :, pad : pad + count * 16], old)
        old = unpack_values(quantize_values(-text[:, :, : count * 16], 4, 16), torch.float32)
        assert torch.equal(values[row : row + 1, :, pad : pad + count * 16], old)
        assert torch.equal(keys[row, :, pad + count * 16 :], text[0, :, count * 16 :])
    assert all(8 <= left < 24 or total < 24 for left in batch.full_precision())


def test_stored_codes_are_appended_to_and_never_change():
    x = torch.randn(1, 2, 200, 32, generator=torch.Generator().manual_seed(0))
    cache, before = store(), None
    for i in range(0, 200, 5):
        cache.append(x[:, :, i : i + 5], x[:, :, i : i + 5])
        cache.flush()
        codes = cache.keys.codes
        if before is not None:
            assert torch.equal(codes[:, :, : before.shape[2]], before)
        before = codes.clone()
    assert before.shape[2] == cache.groups[0] * 16 * 4 // 32 == 24


def test_groups_that_will_be_quantized_are_seen_as_such():
    x = torch.randn(1, 2, 40, 32, generator=torch.Generator().manual_seed(0))
    cache = store()
    cache.append(x, x)
    ahead = cache.flushed(*cache.dense(), cache.due(40))
    cache.flush()
    assert all(torch.equal(a, b) for a, b in zip(ahead, cache.dense(), strict=True))


def test_heads_that_groups_do_not_fit():
    assert [value_group(64, 32), value_group(80, 32), value_group(128, 256)] == [32, 16, 128]
    with pytest.raises(ValueError, match="A head of size 24 can't be cut into groups of 16 or more channels"):
        value_group(24, 32)
