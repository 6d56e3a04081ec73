import pytest
import torch

from hf_efficiency.generation.speculative import (
    Draft,
    DraftControl,
    LookupDrafter,
    Scorer,
    SpeculativeStatistics,
    TreeShape,
    check_shape,
    verify,
)


def _scorer():
    return Scorer(True, lambda rows, prefixes, logits: logits, 10, torch.device("cpu"))


def _lookup(row, k, **lengths):
    drafter = LookupDrafter(**lengths)
    drafter.begin(torch.tensor([row]), None)
    return drafter.propose([row], (1,) * k, _scorer())


def test_lookup_takes_the_longest_agreement_and_the_latest_of_equals():
    # "1 2" came three times; only the second of them came after a 3 as the end does, the last came later
    draft = _lookup([1, 2, 4, 3, 1, 2, 5, 9, 1, 2, 6, 3, 1, 2], 1)
    assert (draft.tokens.tolist(), draft.strength) == ([[5]], 3)
    draft = _lookup([1, 2, 4, 9, 1, 2, 6, 7, 1, 2], 2)
    assert (draft.tokens.tolist(), draft.strength) == ([[6, 7]], 2)


def test_lookup_goes_on_with_a_repetition_and_gives_nothing_without_one():
    assert _lookup([8, 1, 2, 1, 2], 5).tokens.tolist() == [[1, 2, 1, 2, 1]]
    assert _lookup([1, 2, 3, 4], 5) is None
    with pytest.raises(ValueError, match="min_ngram is 3 and max_ngram 2"):
        LookupDrafter(3, 2)


def test_lookup_never_reads_padding():
    drafter = LookupDrafter()
    ids = torch.tensor([[0, 0, 0, 0, 5, 6]])
    drafter.begin(ids, (ids > 0).long())
    assert drafter.propose([[0, 0, 0, 0, 5, 6, 0, 0]], (1, 1), _scorer()) is None


def test_tree_is_numbered_by_depth():
    tree = TreeShape((2, 2, 1))
    assert tree.parents == [-1, -1, 0, 0, 1, 1, 2, 3, 4, 5]
    assert [list(level) for level in tree.levels] == [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]


@pytest.mark.parametrize(
    ("k", "branching", "message"),
    [
        (0, None, "k is 0: draft 1 to 63"),
        (64, None, "k is 64"),
        (True, None, "k is True"),
        (4, (), "branching is"),
        (4, (2, 0), "branching is"),
        (4, (4, 4, 4), "more than 63 nodes"),
        (4, (10**9,), "more than 63 nodes"),
    ],
)
def test_shapes_out_of_range(k, branching, message):
    with pytest.raises(ValueError, match=message):
        check_shape(k, branching)


def test_greedy_follows_the_best_tokens():
    scores = torch.eye(5)[torch.tensor([[2, 3, 4, 0], [1, 3, 4, 0]])]
    chain = Draft(torch.tensor([[2, 3, 1], [2, 3, 4]]))
    assert verify(chain, scores, greedy=True) == ([[0, 1], []], [4, 1])
    tree = Draft(torch.tensor([[1, 2, 4], [1, 2, 4]]), [-1, -1, 1])
    # after the root comes 2 (node 1), whose best is 4 (node 2), whose best is 0
    assert verify(tree, scores, greedy=True) == ([[1, 2], [0]], [0, 3])


@pytest.mark.parametrize("tree", [False, True])
def test_the_next_token_has_the_targets_distribution(tree):
    from scipy.stats import chisquare

    n, p, q = 6000, torch.tensor([0.1, 0.5, 0.15, 0.25]), torch.tensor([0.6, 0.1, 0.2, 0.1])
    torch.manual_seed(0)
    drawn = torch.multinomial(q.expand(n, 4), 3 if tree else 1)
    draft = Draft(drawn, [-1] * drawn.shape[1] if tree else None, q.expand(n, 1, 4).contiguous())
    scores = p.log().expand(n, drawn.shape[1] + 1, 4).contiguous()
    paths, after = verify(draft, scores, greedy=False)
    tokens = [drawn[i, path[0]] if path else after[i] for i, path in enumerate(paths)]
    counts = torch.bincount(torch.tensor(tokens), minlength=4)
    assert chisquare(counts.numpy(), (p.double() / p.double().sum() * n).numpy()).pvalue > 1e-3
    # Leviathan et al. 2023, section 3.1: a chain accepts sum(min(p, q)) = 0.45; three children accept more
    rate = sum(map(len, paths)) / n
    assert rate == pytest.approx(0.45, abs=0.02) if not tree else rate > 0.6


def test_verify_refuses_what_it_cannot_draw():
    scores = torch.zeros(1, 3, 4)
    with pytest.raises(ValueError, match="needs the draft's probabilities"):
        verify(Draft(torch.tensor([[1, 2]]), [-1, -1]), scores, greedy=False)
    with pytest.raises(ValueError, match="leave no token"):
        verify(Draft(torch.empty(1, 0, dtype=torch.long)), torch.full((1, 1, 4), torch.nan), greedy=False)


def test_control_drafts_as_deep_as_pays():
    control = DraftControl((1,) * 8)
    assert control.depth(8) == 0  # the first step is the measure
    control.time(0, 0, 0.0, 1.0)
    assert control.depth(0) == 0
    for _ in range(30):
        control.record(0, 8, 8)
    assert control.depth(8) == 8
    assert control.depth(3) == 3
    for _ in range(60):
        control.record(0, 8, 0)
        control.time(8, 8, 0.8, 1.4)
    assert control.depth(8) == 0
    waits = [control.depth(8) for _ in range(8)]
    assert waits == [0] * 8
    assert control.pause == 16


def test_control_keeps_weak_and_strong_drafts_apart():
    control = DraftControl((1,) * 4)
    control.time(0, 0, 0.0, 1.0)
    for _ in range(20):
        control.record(2, 4, 0)
        control.record(8, 4, 4)
    assert control.depth(4, 2, free=True) == 0
    assert control.depth(4, 8, free=True) == 4
    assert DraftControl((1,) * 4, adapt=False).depth(9) == 4


def test_statistics_count_by_position():
    statistics = SpeculativeStatistics(tokens=6, target_forwards=3)
    statistics.record(3, 3)
    statistics.record(3, 1)
    statistics.record(0, 0)
    assert (statistics.drafted, statistics.accepted) == ([2, 2, 1], [2, 1, 1])
    assert statistics.acceptance_rate == [1.0, 0.5, 1.0]
    assert statistics.tokens_per_forward == 2
    assert "acceptance 0.80" in statistics.summary()
