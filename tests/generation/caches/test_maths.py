"""The arithmetic of caches against numbers worked out by hand."""

import itertools
import math

import pytest
import torch

from hf_efficiency.generation.caches.attention import attention_with_sums, query_blocks
from hf_efficiency.generation.caches.budget import UNBOUNDED, check_budget, layer_budgets, tokens_of
from hf_efficiency.generation.caches.h2o import HeavyHitters
from hf_efficiency.generation.caches.policies import choose, with_recent
from hf_efficiency.generation.caches.rotation import Rotary
from hf_efficiency.generation.caches.simple import Pinned, RandomTokens
from hf_efficiency.generation.caches.slots import Slots, ever_attended, slot_mask
from hf_efficiency.generation.caches.snapkv import ObservationWindow
from hf_efficiency.generation.caches.streaming import Ring, sink_shift, visible
from hf_efficiency.generation.caches.tova import LastAttention


def test_budget_is_tokens_or_a_fraction_of_each_rows_length():
    assert tokens_of(7, [3, 100]) == [7, 7]
    assert tokens_of(0.3, [10, 11, 1]) == [3, 4, 1]
    assert tokens_of(1.0, [10]) == [UNBOUNDED]


def test_pyramid_falls_linearly_and_keeps_the_total():
    budgets = layer_budgets(100, 5, "pyramid")
    # Last layer 100 / 20 = 5, first 200 - 5 = 195, steps of 47.5 (rounded so that the total stays).
    assert budgets == [195, 147, 100, 53, 5] or sum(budgets) == 500
    assert budgets[0] == 195
    assert budgets[-1] in (5, 6)
    assert sum(budgets) == 500
    assert all(a > b for a, b in itertools.pairwise(budgets))
    shares = layer_budgets(0.75, 3, "pyramid")
    assert shares == pytest.approx([1.0, 0.75, 0.5])
    assert layer_budgets(0.5, 3, "pyramid") == pytest.approx([0.975, 0.5, 0.025])
    assert layer_budgets(8, 1, "pyramid") == [8]
    assert layer_budgets(8, 2, [3, 0.5]) == [3, 0.5]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: check_budget("budget", 0), ValueError, "budget is 0 tokens: at least 1"),
        (lambda: check_budget("budget", 1.5), ValueError, "budget is 1.5: a fraction of the prompt lies above 0"),
        (lambda: check_budget("budget", True), TypeError, "budget is True: give tokens as an int"),
        (lambda: layer_budgets(4, 2, "cone"), ValueError, "schedule is 'cone': choose 'uniform', 'pyramid'"),
        (lambda: layer_budgets(4, 2, [4]), ValueError, "schedule has 1 budgets, and 2 layers need one each"),
        (lambda: ObservationWindow(recent=0), ValueError, "observation window is 0"),
        (lambda: ObservationWindow(kernel_size=4), ValueError, "kernel_size is 4: give an odd number"),
        (lambda: Pinned(spans=[(3, 3)]), ValueError, r"pinned span \(3, 3\) is empty"),
    ],
)
def test_bad_numbers_are_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_choose_keeps_the_highest_and_of_equals_the_older():
    scores = torch.tensor([[[3.0, 1, 2, 2, 9]]])
    alive = torch.tensor([[[True, True, True, True, False]]])
    kept = choose(scores, alive, torch.tensor([2]))
    assert kept.tolist() == [[[True, False, True, False, False]]]
    one = choose(scores, alive, torch.tensor([3]), excess=1)
    assert one.tolist() == [[[True, False, True, True, False]]]
    ties = torch.tensor([[[2.0, 1, 1, 5, 1]]])
    assert choose(ties, torch.ones_like(alive), torch.tensor([4]), excess=1).tolist() == [
        [[True, True, True, True, False]]
    ]
    assert torch.equal(choose(scores, alive, torch.tensor([9]), excess=1), alive)


def test_one_step_of_choose_is_what_the_sort_gives():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores = torch.randint(0, 4, (2, 3, 9), generator=generator).float()
        alive = torch.rand(2, 3, 9, generator=generator) > 0.3
        capacity = alive.sum(2).amax(1) - 1
        keep = alive.sum(2, keepdim=True) <= capacity.view(-1, 1, 1) + 1
        both = [choose(scores, alive, capacity, excess) for excess in (None, 1)]
        assert torch.equal(both[0] & keep, both[1] & keep)


def test_heavy_hitters_add_up_and_the_newest_are_protected():
    policy = HeavyHitters(recent=0.5)
    assert policy.recent_tokens([5, 8]) == [2, 4]
    assert HeavyHitters(recent=6).recent_tokens([5, 8]) == [5, 6]
    scores = policy.observe(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.25, 0.75]]]), torch.zeros(1), 1, False)
    assert scores.tolist() == [[[1.25, 0.75]]]
    protected = with_recent(torch.zeros(1, 1, 4), torch.tensor([[[0, 1, 2, 3]]]), 3, torch.tensor([2]))
    assert protected.tolist() == [[[0, 0, math.inf, math.inf]]]


def test_snapkv_pools_the_votes_of_the_window():
    policy = ObservationWindow(recent=2, kernel_size=3)
    sums = torch.tensor([[[0.0, 3, 0, 6, 5, 5]]])
    scores = policy.observe(torch.zeros(1, 1, 6), sums, torch.arange(6).view(1, 1, 6), 5, True)
    # (0+0+3)/3, (0+3+0)/3, (3+0+6)/3, (0+6+0)/3: the window's own 5s take no part.
    assert scores[0, 0, :4].tolist() == pytest.approx([1, 1, 3, 2])
    assert policy.scored_queries(9, prompt=True) == 2
    assert policy.scored_queries(1, prompt=False) == 0


def test_tova_forgets_and_averages_over_heads():
    sums = torch.tensor([[[0.2, 0.8], [0.6, 0.4]]])
    scores = torch.tensor([[[math.inf, 5.0], [math.inf, 7.0]]])
    assert LastAttention().observe(scores, sums, torch.zeros(1), 1, False)[0, :, 1].tolist() == pytest.approx([0.6] * 2)
    assert LastAttention().observe(scores, sums, torch.zeros(1), 1, False)[0, 0, 0] == math.inf


def test_pinned_tokens_are_counted_in_the_rows_own_text():
    policy = Pinned(spans=[(0, 2), (1, 3)], inner=HeavyHitters(recent=0.5))
    assert policy.pinned == 3
    assert policy.recent_tokens([7]) == [2]
    scores = policy.begin(torch.tensor([[-1, -1, 0, 1, 2, 3]]), (1, 1, 6), 0)
    assert scores.isinf().tolist() == [[[False, False, True, True, True, False]]]
    after = policy.observe(scores, torch.ones(1, 1, 6), torch.zeros(1), 1, False)
    assert torch.equal(after.isinf(), scores.isinf())
    assert after[0, 0, 5] == 1


def test_random_scores_depend_on_place_head_and_layer_alone():
    policy = RandomTokens()
    scores = policy.begin(torch.arange(2000).view(1, -1), (1, 2, 2000), 3)
    assert torch.equal(scores[:, :, 5:9], policy.begin(torch.arange(5, 9).view(1, -1), (1, 2, 4), 3))
    assert not torch.equal(scores, policy.begin(torch.arange(2000).view(1, -1), (1, 2, 2000), 4))
    assert abs(float(scores.mean()) - 0.5) < 0.03
    assert abs(float(scores.var()) - 1 / 12) < 0.01
    assert abs(float(torch.corrcoef(scores[0])[0, 1])) < 0.1


def test_slots_are_written_over_and_memory_is_given_back():
    keys = torch.arange(8.0).view(1, 2, 4, 1)
    slots = Slots(keys, keys)
    slots.insert(keys, keys, 0, 0)
    assert slots.positions.tolist() == [[[0, 1, 2, 3]] * 2]
    kept = torch.tensor([[[True, False, True, True], [False, True, True, True]]])
    slots.keep(kept)
    new = torch.full((1, 2, 1, 1), 9.0)
    index = slots.insert(new, new, 4, 1)
    assert index.tolist() == [[[1], [0]]]
    assert slots.size == 4
    assert slots.positions.tolist() == [[[0, 4, 2, 3], [4, 1, 2, 3]]]
    slots.compact(4)
    assert slots.positions.tolist() == [[[0, 2, 3, 4], [1, 2, 3, 4]]]
    assert slots.keys.flatten().tolist() == [0, 2, 3, 9, 5, 6, 7, 9]


def test_mask_over_tokens_becomes_one_over_slots():
    positions = torch.tensor([[[4, 0, -1, 3]]], dtype=torch.int32)
    assert slot_mask(None, positions, 3, 2).tolist() == [[[[False, True, False, True], [True, True, False, True]]]]
    padded = torch.tensor([False, True, True, True, True]).view(1, 1, 1, 5)
    assert slot_mask(padded, positions, 4, 1).tolist() == [[[[True, False, False, True]]]]
    assert ever_attended(padded, positions).tolist() == [[[True, False, False, True]]]
    added = torch.tensor([0.0, -1, -2, -3, -4]).view(1, 1, 1, 5)
    low = torch.finfo(torch.float32).min
    assert slot_mask(added, positions, 4, 1).tolist() == [[[[-4, 0, low, -3]]]]


def test_attention_gives_the_sum_of_its_weights():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 3, 8, generator=generator), torch.randn(1, 2, 5, 8, generator=generator)
    mask = torch.ones(1, 2, 3, 5, dtype=torch.bool)
    mask[:, 1, :, 2] = False
    output, sums = attention_with_sums(query, key, key, mask, 0.5)
    wide, hidden = key.repeat_interleave(2, 1), mask.repeat_interleave(2, 1)
    weights = ((query @ wide.mT) * 0.5).masked_fill(~hidden, -torch.inf).softmax(-1)
    torch.testing.assert_close(output, (weights @ wide).transpose(1, 2))
    torch.testing.assert_close(sums, weights.view(1, 2, 2, 3, 5).sum((2, 3)))
    assert query_blocks(query, key) == [(0, 3)]
    assert query_blocks(torch.empty(1, 2**20, 5, 1), key.expand(1, 2, 5, 8), 1, 5) == [(1, 5)]
    assert len(query_blocks(torch.empty(1, 2**24, 5, 1), key)) == 5


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_moves_a_key_to_another_position(interleaved):
    """As complex numbers: x e^(i p f) moved by s is x e^(i (p + s) f). What is not rotated stays."""
    frequencies = torch.tensor([1.0, 0.1])
    x = torch.randn(1, 1, 1, 6, generator=torch.Generator().manual_seed(0))
    pairs = x[..., :4].reshape(2, 2) if interleaved else x[..., :4].reshape(2, 2).T
    moved = torch.complex(pairs[:, 0], pairs[:, 1]) * torch.polar(torch.ones(2), 3 * frequencies)
    found = Rotary(frequencies, interleaved).shift(x, torch.tensor([[3]]))
    expected = torch.stack((moved.real, moved.imag), 1 if interleaved else 0).flatten()
    torch.testing.assert_close(found[0, 0, 0, :4], expected)
    assert torch.equal(found[..., 4:], x[..., 4:])


def test_rule_of_sinks_and_window():
    """Query 5 with 1 sink and a window of 2 sees 0, 4 and 5."""
    seen = visible(torch.tensor([[5, 1]]), torch.tensor([[0, 1, 2, 3, 4, 5, -1]]), 1, 2)
    assert seen[0, 0, 0].int().tolist() == [1, 0, 0, 0, 1, 1, 0]
    assert sink_shift(torch.tensor([[1, 2, 3, 9]]), 1, 2).tolist() == [[0, 0, 1, 7]]


def test_ring_keeps_sinks_by_row_and_the_newest():
    keys = torch.arange(1.0, 8).view(1, 1, 7, 1).expand(2, 1, 7, 1)
    ring = Ring(keys, keys, 1, 3)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, :2] = False
    ring.write(keys[:, :, :4], keys[:, :, :4], 0, real[:, :4])
    ring.write(keys[:, :, 4:], keys[:, :, 4:], 4, real[:, 4:])
    # Tokens 1..7 at positions 0..6: position p lies at slot 1 + p mod 3. The second row's text starts at position 2.
    assert ring.keys[:, 0, :, 0].tolist() == [[1, 7, 5, 6], [3, 7, 5, 6]]
    assert ring.ranks.tolist() == [[0, 6, 4, 5], [0, 4, 2, 3]]
    assert ring.lengths.tolist() == [7, 5]
