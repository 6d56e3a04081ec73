"""Verification of drafted tokens: the kernels against their references, and what both do at the edges."""

import pytest
import torch

from hf_efficiency.kernels.spec_verify import (
    kernel,
    op,
    reference,
    verify_chain,
    verify_chain_greedy,
    verify_chain_logits,
    verify_tree,
    verify_tree_greedy,
)
from tests.kernels.harness import DTYPES, guarded, guards_intact, poisoned

# The interpreter computes with numpy, which warns of the logarithm of an empty sum.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

CHAINS = [(1, 1, 1), (3, 0, 5), (4, 3, 7), (2, 5, 1025)]
TREES = [(1, 1, 1), (2, 0, 5), (9, 6, 7), (2, 11, 1025)]
LAST = 1 - 2.0**-24  # the largest uniform


def probabilities(*shape):
    return torch.softmax(2 * torch.randn(*shape), -1)


def chain_inputs(b, k, v, dtype=torch.float32):
    draft, target = probabilities(b, k, v), probabilities(b, k + 1, v)
    tokens = torch.multinomial(draft.flatten(0, 1), 1).view(b, k) if k else torch.zeros(b, 0, dtype=torch.long)
    return tokens, draft.to(dtype), target.to(dtype), torch.rand(b, k + 1)


def tree_inputs(b, n, v, dtype=torch.float32):
    """Trees at random. Tokens follow their parents' draft distribution, so that some are accepted."""
    parents = torch.stack([torch.randint(-1, i, (b,)) for i in range(n)], 1) if n else torch.zeros(b, 0).long()
    draft, target = probabilities(b, n + 1, v), probabilities(b, n + 1, v)
    rows = draft[torch.arange(b)[:, None], parents + 1]  # (b, n, v)
    tokens = torch.multinomial(rows.reshape(-1, v), 1).view(b, n) if n else parents
    return tokens, parents, draft.to(dtype), target.to(dtype), torch.rand(b, n + 1)


def same(actual, expected):
    return all(map(torch.equal, actual, expected)) and all(x.dtype == torch.int64 for x in actual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "k", "v"), CHAINS)
def test_chain_equals_the_reference(b, k, v, dtype):
    torch.manual_seed(0)
    given = [guarded(x) for x in chain_inputs(b, k, v, dtype)]
    for lengths in (None, guarded(torch.randint(0, k + 1, (b,)))):
        with poisoned():
            actual = kernel.verify_chain(*given, lengths)
        assert same(actual, reference.verify_chain(*given, lengths))
    assert all(map(guards_intact, given))


@pytest.mark.parametrize("plan", [(9, 1024, 1, 1024, 4), (2, 8192, 1, 4096, 8), (1, 256, 64, 128, 16)])
def test_every_split_gives_the_same(plan, monkeypatch):
    torch.manual_seed(1)
    given = [guarded(x) for x in chain_inputs(3, 2, 9001)]
    monkeypatch.setattr(kernel, "_plan", lambda b, v: kernel._Plan(*plan))
    with poisoned():
        actual = kernel.verify_chain(*given, None)
        logits = kernel.verify_chain_logits(given[0], given[1].log(), given[2].log(), given[3], None, 0.7)
    assert same(actual, reference.verify_chain(*given, None))
    assert same(logits, reference.verify_chain_logits(given[0], given[1].log(), given[2].log(), given[3], None, 0.7))


def test_plans_cover_the_row():
    for b in (1, 8, 64, 263, 264, 5000):
        for v in (1, 8192, 8193, 32000, 50257, 128256, 262144):
            plan = kernel._plan(b, v)
            assert (plan.parts - 1) * plan.chunk < v <= plan.parts * plan.rows * plan.chunk
            assert plan.chunk % plan.columns == 0
            assert plan.parts <= 256


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "n", "v"), TREES)
def test_tree_equals_the_reference(b, n, v, dtype):
    torch.manual_seed(2)
    given = [guarded(x) for x in tree_inputs(b, n, v, dtype)]
    settings = [(None, True, n), (guarded(torch.randint(0, n + 1, (b,))), False, n), (None, False, min(n, 2))]
    for lengths, replacement, depth in settings:
        with poisoned():
            actual = kernel.verify_tree(*given, lengths, replacement, depth)
        assert same(actual, reference.verify_tree(*given, lengths, replacement, depth))
    assert all(map(guards_intact, given))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "k", "v"), CHAINS)
def test_logits_equal_the_reference(b, k, v, dtype):
    torch.manual_seed(3)
    tokens, draft, target, uniforms = chain_inputs(b, k, v)
    draft, target = (guarded(x.log().to(dtype)) for x in (draft, target))
    if v > 1:
        target[..., 0] = -torch.inf
    lengths = torch.randint(0, k + 1, (b,))
    with poisoned():
        actual = kernel.verify_chain_logits(tokens, draft, target, uniforms, lengths, 0.8)
    assert same(actual, reference.verify_chain_logits(tokens, draft, target, uniforms, lengths, 0.8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "n", "v"), [(1, 0, 1), (4, 5, 7), (2, 3, 4099)])
def test_greedy_equals_the_reference(b, n, v, dtype):
    torch.manual_seed(4)
    scores = guarded(torch.randint(-3, 4, (b, n + 1, v)).to(dtype))  # full of ties
    best = scores.float().argmax(-1)
    parents = torch.arange(-1, n - 1).expand(b, n).contiguous()
    parents[:, n // 2 :] -= int(n > 2)
    tokens = best[torch.arange(b)[:, None], parents + 1]
    tokens[-1, -1:] = (tokens[-1, -1:] + 1) % v
    for lengths in (None, torch.randint(0, n + 1, (b,))):
        with poisoned():
            chain = kernel.verify_chain_greedy(best[:, :n], scores, lengths)
            tree = kernel.verify_tree_greedy(tokens, parents, scores, lengths, n)
        assert same(chain, reference.verify_chain_greedy(best[:, :n], scores, lengths))
        assert same(tree, reference.verify_tree_greedy(tokens, parents, scores, lengths, n))
        assert torch.equal(chain[0], torch.full((b,), n) if lengths is None else lengths)
    assert guards_intact(scores)


def test_greedy_by_hand():
    """Ties go to the lowest index; a NaN counts as -inf; of a tree's children the one with the best token follows."""
    nan = float("nan")
    scores = torch.tensor([[[0.0, 2, 2], [nan, -1, -2], [5, 1, 5]]])
    for functions in (kernel, reference):
        accepted, token = functions.verify_chain_greedy(torch.tensor([[1, 1]]), scores, None)
        assert (accepted.item(), token.item()) == (2, 0)
        accepted, token = functions.verify_chain_greedy(torch.tensor([[1, 2]]), scores, None)
        assert (accepted.item(), token.item()) == (1, 1)
        found = functions.verify_tree_greedy(torch.tensor([[2, 1]]), torch.tensor([[-1, -1]]), scores, None, 3)
        assert [x.tolist() for x in found] == [[[1, -1, -1]], [1], [0]]


def test_a_chain_is_a_tree_without_branches():
    torch.manual_seed(8)
    tokens, draft, target, uniforms = chain_inputs(300, 4, 9)
    parents = torch.arange(-1, 3).expand(300, 4)
    path, number, token = reference.verify_tree(tokens, parents, draft, target, uniforms, None, True, 4)
    assert same((number, token), reference.verify_chain(tokens, draft, target, uniforms, None))
    assert torch.equal(path, torch.where(torch.arange(4) < number[:, None], torch.arange(4), -1))


@pytest.mark.parametrize("functions", [kernel, reference])
@pytest.mark.parametrize("u", [0.0, LAST, 1.0])
def test_what_has_no_probability_is_never_drawn(functions, u):
    """Zeros at both ends and in between, at the uniforms where rounding would show; p = 0 is never accepted either."""
    target = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0]).expand(2, 2, 5)
    draft = torch.tensor([[[0.2, 0.8, 0, 0, 0]], [[0.0, 0, 0, 0.5, 0.5]]])
    uniforms = torch.tensor([[0.0, u]]).expand(2, 2)
    accepted, token = functions.verify_chain(torch.tensor([[0], [4]]), draft, target, uniforms, None)
    assert accepted.tolist() == [0, 0]
    assert token.tolist() == [3, 3 if u else 1]  # residuals: 0.7 at 3, and 0.3 at 1 with 0.2 at 3
    parents = torch.full((2, 1), -1)
    found = functions.verify_tree(torch.tensor([[0], [4]]), parents, draft, target, uniforms, None, True, 1)
    assert found[2].tolist() == token.tolist()


@pytest.mark.parametrize("functions", [kernel, reference])
def test_rows_without_a_residual(functions):
    """p = q and a uniform of 1 refuse without a residual: p is drawn from. A row of NaN has nothing to draw: -1."""
    even = torch.full((1, 1, 4), 0.25)
    tokens, uniforms = torch.zeros(1, 1, dtype=torch.long), torch.tensor([[1.0, 0.6]])
    parents = torch.full((1, 1), -1)
    for target, expected in ((even.expand(1, 2, 4), 2), (torch.full((1, 2, 4), float("nan")), -1)):
        accepted, token = functions.verify_chain(tokens, even, target, uniforms, None)
        assert (accepted.item(), token.item()) == (0, expected)
        path, number, token = functions.verify_tree(tokens, parents, even, target, uniforms, None, False, 1)
        assert (path.item(), number.item(), token.item()) == (-1, 0, expected)


@pytest.mark.parametrize("functions", [kernel, reference])
def test_what_lies_behind_the_length_is_not_used(functions):
    torch.manual_seed(9)
    tokens, draft, target, uniforms = chain_inputs(4, 3, 7)
    lengths = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    uniforms[:, :3] = 0  # all are accepted
    expected = [
        reference.verify_chain(tokens[[i]], draft[[i]], target[[i]], uniforms[[i]], lengths[[i]]) for i in range(4)
    ]
    for i in range(4):
        tokens[i, i:], draft[i, i:], target[i, i + 1 :] = 10**12, float("nan"), float("nan")
    accepted, token = functions.verify_chain(tokens, draft, target, uniforms, lengths)
    assert accepted.tolist() == lengths.tolist()
    assert token.tolist() == [x[1].item() for x in expected]


@pytest.mark.parametrize("functions", [kernel, reference])
def test_nodes_that_are_passed_over(functions):
    """No row in the draft, too deep, a parent that comes later, tokens out of range, a draft that is used up."""
    torch.manual_seed(10)
    target, uniforms = probabilities(1, 4, 5), torch.tensor([[0.0, 0, 0, 0.5]])
    draft = torch.full((1, 4, 5), 0.2)

    def path(tokens, parents, rows=4, depth=3, draft=draft):
        given = torch.tensor([tokens]), torch.tensor([parents]), draft[:, :rows], target, uniforms, None, False, depth
        return functions.verify_tree(*given)[0][0].tolist()

    assert path([1, 2, 3], [-1, 0, 1]) == [0, 1, 2]
    assert path([1, 2, 3], [-1, 0, 1], rows=2) == [0, 1, -1]
    assert path([1, 2, 3], [-1, 0, 1], rows=0) == [-1, -1, -1]
    assert path([1, 2, 3], [-1, 0, 1], depth=1) == [0]
    assert path([1, 2, 3], [-1, 0, 1], depth=0) == []
    assert path([1, 2, 3], [-1, 2, 0]) == [0, 2, -1]
    assert path([-1, 5, 3], [-1, -1, -1]) == [2, -1, -1]
    assert path([-1, 5, 3], [-1, -1, 1]) == [-1, -1, -1]
    certain = torch.tensor([1.0, 0, 0, 0, 0]).expand(1, 4, 5)  # after token 0 nothing is left of it
    uniforms[0, 0] = 1
    assert path([0, 3, 3], [-1, -1, -1], draft=certain) == [-1, -1, -1]


def test_any_layout_and_integer():
    torch.manual_seed(11)
    tokens, draft, target, uniforms = chain_inputs(2, 3, 6)
    expected = reference.verify_chain(tokens, draft, target, uniforms, None)
    spread = [torch.stack([x, x], -1)[..., 0] for x in (draft, target)]
    assert same(kernel.verify_chain(tokens.int(), *spread, uniforms.T.contiguous().T, None), expected)
    padded = [torch.cat([x, x], -1)[..., :6] for x in (draft, target)]  # rows apart
    assert same(kernel.verify_chain(tokens.T.contiguous().T, *padded, uniforms, None), expected)
    parents = torch.tensor([[-1, -1, 0]]).expand(2, 3)
    one = target[:1, :1].expand(2, 4, 6)  # one row for all
    given = parents, one, one, uniforms
    assert same(
        kernel.verify_tree(tokens.int(), parents.int(), *given[1:], None, True, 3),
        reference.verify_tree(tokens, *given, None, True, 3),
    )


def test_operators_are_sound():
    torch.manual_seed(12)
    tokens, draft, target, uniforms = chain_inputs(2, 3, 6)
    lengths, parents = torch.tensor([3, 1]), torch.tensor([[-1, -1, 0], [-1, 0, 1]])
    torch.library.opcheck(op._verify_chain, (tokens, draft, target, uniforms, lengths))
    torch.library.opcheck(op._verify_chain_logits, (tokens, draft, target, uniforms, None, 0.5))
    torch.library.opcheck(op._verify_chain_greedy, (tokens, target, lengths))
    torch.library.opcheck(op._verify_tree, (tokens, parents, draft, target, uniforms, lengths, False, 2))
    torch.library.opcheck(op._verify_tree_greedy, (tokens, parents, target, None, 3))


def test_compiles_without_a_break():
    torch.manual_seed(13)
    given = chain_inputs(2, 3, 6)
    compiled = torch.compile(verify_chain, fullgraph=True, backend="aot_eager")
    assert same(compiled(*given), verify_chain(*given))
    parents = torch.tensor([[-1, -1, 0]]).expand(2, 3)
    tree = torch.compile(verify_tree, fullgraph=True, backend="aot_eager")
    assert same(tree(given[0], parents, *given[1:]), verify_tree(given[0], parents, *given[1:]))


def test_public_functions():
    torch.manual_seed(14)
    tokens, draft, target, uniforms = chain_inputs(2, 3, 6)
    parents = torch.arange(-1, 2).expand(2, 3)
    expected = reference.verify_chain(tokens, draft, target, uniforms, None)
    assert same(verify_chain_logits(tokens, draft.log() / 2, target.log() / 2, uniforms, temperature=0.5), expected)
    assert same(verify_tree(tokens, parents, draft, target, uniforms)[1:], expected)
    assert same(verify_tree_greedy(tokens, parents, target)[1:], verify_chain_greedy(tokens, target))
    assert verify_tree(tokens, parents, draft, target, uniforms, max_depth=2)[0].shape == (2, 2)
    nothing = chain_inputs(0, 3, 6)
    assert [x.shape for x in verify_chain(*nothing)] == [(0,), (0,)]
    assert verify_tree_greedy(nothing[0], nothing[0], nothing[2])[0].shape == (0, 3)


def test_bad_input_is_named():
    tokens, draft, target, uniforms = chain_inputs(2, 3, 6)
    with pytest.raises(ValueError, match=r"draft_tokens has shape \(2, 3\) and target_probs \(2, 3, 6\).*k \+ 1"):
        verify_chain(tokens, draft, target[:, :3], uniforms)
    with pytest.raises(ValueError, match=r"draft_probs has shape \(2, 3, 5\).*\(2, 4, 6\): it must be \(2, 3, 6\)"):
        verify_chain(tokens, draft[..., :5], target, uniforms)
    with pytest.raises(ValueError, match=r"uniforms has shape \(2, 3\).*must be \(2, 4\)"):
        verify_chain(tokens, draft, target, uniforms[:, :3])
    with pytest.raises(ValueError, match=r"uniforms is torch.float16: it must be float32"):
        verify_chain(tokens, draft, target, uniforms.half())
    with pytest.raises(ValueError, match=r"draft_tokens is torch.float32: cast it to int64"):
        verify_chain(tokens.float(), draft, target, uniforms)
    with pytest.raises(ValueError, match=r"target_probs is torch.float64: cast it"):
        verify_chain(tokens, draft, target.double(), uniforms)
    with pytest.raises(ValueError, match=r"target_probs has shape \(2, 4, 0\): there is no token"):
        verify_chain(tokens, draft, target[..., :0], uniforms)
    with pytest.raises(ValueError, match=r"lengths has shape \(3,\).*must be \(2,\)"):
        verify_chain(tokens, draft, target, uniforms, torch.zeros(3).long())
    for place in range(1, 4):
        given = [tokens, draft, target, uniforms]
        given[place] = given[place].to("meta")
        name = ("draft_probs", "target_probs", "uniforms")[place - 1]
        with pytest.raises(ValueError, match=f"draft_tokens lies on cpu and {name} on meta"):
            verify_chain(*given)
    with pytest.raises(ValueError, match=r"temperature is 0: it must be above zero; `verify_chain_greedy`"):
        verify_chain_logits(tokens, draft, target, uniforms, temperature=0)
    with pytest.raises(ValueError, match=r"parents has shape \(2, 2\) and draft_tokens \(2, 3\)"):
        verify_tree(tokens, tokens[:, :2], draft, target, uniforms)
    with pytest.raises(ValueError, match=r"draft_probs has shape \(2, 5, 6\).*m at most 4"):
        verify_tree(tokens, tokens, target[:, [0, 1, 2, 3, 3]], target, uniforms)
    with pytest.raises(ValueError, match=r"max_depth is -1: it must be 0 or more"):
        verify_tree_greedy(tokens, tokens, target, max_depth=-1)
