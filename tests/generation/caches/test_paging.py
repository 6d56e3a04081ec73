"""Blocks, tables, reference counts and copy on write."""

import gc

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_efficiency.generation.caches.paging import BlockPool, Tables


def tables(rows=1, block=4):
    empty = torch.empty(rows, 2, 0, 3)
    return Tables(BlockPool(empty, empty, block), rows)


def tokens(rows, t, seed=0):
    return torch.randn(rows, 2, t, 3, generator=torch.Generator().manual_seed(seed))


def test_a_shared_block_is_copied_when_one_table_writes():
    first = tables()
    x = tokens(1, 6)
    first.append(x, -x)
    assert first.rows == [[0, 1]]
    assert first.pool.counts == [1, 1]
    second = first.fork()
    assert first.pool.counts == [2, 2]
    y = tokens(1, 1, seed=1)
    second.append(y, -y)
    # The full block stays shared, the half-full one is copied.
    assert second.rows == [[0, 2]]
    assert first.pool.counts == [2, 1, 1]
    assert torch.equal(first.dense()[0], x)
    assert torch.equal(second.dense()[0], torch.cat((x, y), 2))
    assert torch.equal(second.dense()[1], -torch.cat((x, y), 2))
    del second
    gc.collect()
    assert first.pool.counts == [1, 1, 0]
    first.pool.trim()
    assert first.pool.keys.shape[0] == 2


def test_full_blocks_are_shared_for_good():
    first = tables()
    x = tokens(1, 8)
    first.append(x, x)
    first.select([0, 0, 0])
    y = tokens(3, 1, seed=1)
    first.append(y, y)
    assert first.rows == [[0, 1, 2], [0, 1, 3], [0, 1, 4]]
    assert torch.equal(first.dense()[0], torch.cat((x.expand(3, -1, -1, -1), y), 2))


@given(st.lists(st.tuples(st.sampled_from(["append", "crop", "select", "trim"]), st.integers(0, 9)), max_size=25))
@settings(max_examples=60, deadline=None)
def test_any_history_reads_like_plain_tensors(history):
    paged, plain = tables(2), torch.empty(2, 2, 0, 3)
    for seed, (action, number) in enumerate(history):
        if action == "append":
            new = tokens(plain.shape[0], number + 1, seed)
            paged.append(new, 2 * new)
            plain = torch.cat((plain, new), 2)
        elif action == "crop":
            number = min(number, plain.shape[2])
            paged.crop(number)
            plain = plain[:, :, : plain.shape[2] - number]
        elif action == "select":
            order = [number % plain.shape[0], 0, (number + 1) % plain.shape[0]][: 1 + number % 3]
            paged.select(order)
            plain = plain[order]
        else:
            paged.pool.trim()
        if plain.shape[2]:
            assert torch.equal(paged.dense()[0], plain)
            assert torch.equal(paged.dense()[1], 2 * plain)
        references = [0] * len(paged.pool.counts)
        for row in paged.rows:
            for block in row:
                references[block] += 1
        assert references == paged.pool.counts
