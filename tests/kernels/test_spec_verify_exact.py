"""Verification of drafted tokens: the references against the papers' algorithms written out, and against what these
promise, the target's own distribution; with flaws that the test must see."""

import numpy as np
import pytest
import torch

from hf_efficiency.kernels.spec_verify import kernel, reference
from tests.kernels.test_spec_verify import chain_inputs, probabilities, same


def textbook_draw(p, u):
    return int(np.searchsorted(np.cumsum(p) / p.sum(), u, side="right"))


def textbook_chain(tokens, q, p, u):
    """Leviathan et al. 2023, Algorithm 1, one sequence, float64, each distribution written out."""
    for i, x in enumerate(tokens):
        if u[i] >= p[i][x] / q[i][x]:
            rest = np.maximum(p[i] - q[i], 0)
            return i, textbook_draw(rest / rest.sum(), u[-1])
    return len(tokens), textbook_draw(p[-1], u[-1])


def textbook_tree(tokens, parents, q, p, u, replacement):
    """Miao et al. 2023, Algorithm 2, one sequence, float64: each residual and each reduced draft written out."""
    path, node = [], -1
    while True:
        rest, draft = p[node + 1], q[node + 1]
        for i in (i for i, parent in enumerate(parents) if parent == node):
            x = tokens[i]
            if u[i] < rest[x] / draft[x]:
                path.append(i)
                node = i
                break
            rest = np.maximum(rest - draft, 0)
            rest = rest / rest.sum()
            if not replacement:
                draft = np.where(np.arange(len(draft)) == x, 0, draft)
                draft = draft / draft.sum()
        else:
            return path, textbook_draw(rest, u[-1])


def test_references_follow_the_papers():
    torch.manual_seed(5)
    given = chain_inputs(200, 3, 6)
    accepted, token = reference.verify_chain(*given, None)
    wide = [x.double().numpy() if x.is_floating_point() else x.numpy() for x in given]
    assert list(zip(accepted.tolist(), token.tolist(), strict=True)) == [
        textbook_chain(*row) for row in zip(*wide, strict=True)
    ]
    assert len(set(accepted.tolist())) == 4


@pytest.mark.parametrize("replacement", [True, False])
def test_reference_of_trees_follows_the_paper(replacement):
    torch.manual_seed(6)
    b, v = 300, 6
    parents = torch.tensor([-1, -1, -1, 0, 0, 1, 3]).expand(b, 7)
    draft, target, uniforms = probabilities(b, 8, v), probabilities(b, 8, v), torch.rand(b, 8)
    tokens = torch.empty(b, 7, dtype=torch.long)
    for node in (-1, 0, 1, 3):
        children = (parents[0] == node).nonzero()[:, 0]
        tokens[:, children] = torch.multinomial(draft[:, node + 1], len(children), replacement=replacement)
    path, number, token = reference.verify_tree(tokens, parents, draft, target, uniforms, None, replacement, 7)
    given = [x.numpy() for x in (tokens, parents, draft.double(), target.double(), uniforms.double())]
    expected = [textbook_tree(*row, replacement) for row in zip(*given, strict=True)]
    assert [(p[:k], t) for p, k, t in zip(path.tolist(), number.tolist(), token.tolist(), strict=True)] == expected
    assert set(number.tolist()) == {0, 1, 2, 3}


def p_value(counts, expected):
    """Pearson's chi-square: the chance of a deviation at least as large, given probabilities (cells,)."""
    expected = expected.double() * counts.sum()
    assert expected.min() > 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()


TRIALS = 100_000
# A Markov chain over 5 tokens stands for the models: row 0 starts it, row x + 1 follows token x.
V = 5


def models():
    torch.manual_seed(7)
    target, draft = (torch.softmax(0.7 * torch.randn(V + 1, V), -1) for _ in range(2))
    return target, draft


def three_tokens(emitted, count, target):
    """Counts of the V³ sequences that generation begins with: emitted (trials, at least 3), `count` of each valid, and
    the target model's own draws after them."""
    for i in range(3):
        own = torch.multinomial(target[emitted[:, i - 1] + 1] if i else target[:1].expand(TRIALS, V), 1)[:, 0]
        emitted[:, i] = torch.where(i < count, emitted[:, i], own)
    return torch.bincount(emitted[:, 0] * V * V + emitted[:, 1] * V + emitted[:, 2], minlength=V**3)


def joint(target):
    return (target[0][:, None, None] * target[1:][:, :, None] * target[1:][None]).flatten()


@pytest.mark.parametrize("flaw", [None, "draws from p", "ratio inverted"])
def test_chains_keep_the_target_distribution(flaw):
    target, draft = models()
    first = torch.multinomial(draft[:1].expand(TRIALS, V), 1)
    tokens = torch.cat([first, torch.multinomial(draft[first[:, 0] + 1], 1)], 1)
    states = torch.cat([torch.zeros_like(first), tokens + 1], 1)  # (trials, 3)
    q, p, uniforms = draft[states[:, :2]], target[states], torch.rand(TRIALS, 3)
    if flaw == "ratio inverted":
        accepted, token = verify_swapped(tokens, q, p, uniforms)
    else:
        accepted, token = reference.verify_chain(tokens, q, p, uniforms, None)
    if flaw == "draws from p":
        token = torch.multinomial(p[torch.arange(TRIALS), accepted], 1)[:, 0]
    if flaw is None:
        few = [x[:64] for x in (tokens, q, p, uniforms)]
        assert same(kernel.verify_chain(*few, None), (accepted[:64], token[:64]))
    emitted = torch.cat([tokens, tokens[:, :1]], 1)
    emitted[torch.arange(TRIALS), accepted] = token
    chance = p_value(three_tokens(emitted, accepted + 1, target), joint(target))
    assert chance > 1e-3 if flaw is None else chance < 1e-9


def verify_swapped(tokens, q, p, uniforms):
    """A wrong test, u p < q, for the negative control."""
    accepted = reference.verify_chain(tokens, p[:, :2], torch.cat([q, p[:, 2:]], 1), uniforms, None)[0]
    row = torch.arange(TRIALS)
    residual = (p[row, accepted] - q[row, accepted.clamp(max=1)]).clamp(min=0)
    return accepted, torch.multinomial(torch.where((accepted < 2)[:, None], residual, p[:, 2]), 1)[:, 0]


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("flaw", [None, "draws from p", "wrong flag"])
def test_trees_keep_the_target_distribution(drawn, flaw):
    target, draft = models()
    parents = torch.tensor([-1, -1, -1, 0, 0, 1, 3])
    tokens = torch.empty(TRIALS, 7, dtype=torch.long)
    for node in (-1, 0, 1, 3):
        children = (parents == node).nonzero()[:, 0]
        rows = draft[tokens[:, node] + 1] if node >= 0 else draft[:1].expand(TRIALS, V)
        tokens[:, children] = torch.multinomial(rows, len(children), replacement=drawn)
    states = torch.cat([torch.zeros(TRIALS, 1).long(), tokens + 1], 1)  # (trials, 8)
    q, p, uniforms = draft[states[:, :5]], target[states], torch.rand(TRIALS, 8)  # nodes 4 to 6 have no children
    given = (tokens, parents.expand(TRIALS, 7), q, p, uniforms)
    replacement = drawn != (flaw == "wrong flag")
    path, number, token = reference.verify_tree(*given, None, replacement, 3)
    if flaw == "draws from p":
        end = path.gather(1, (number - 1).clamp(min=0)[:, None])[:, 0]  # -1 for none
        token = torch.multinomial(p[torch.arange(TRIALS), end + 1], 1)[:, 0]
    if flaw is None:
        few = [x[:64] for x in given]
        assert same(kernel.verify_tree(*few, None, replacement, 3), (path[:64], number[:64], token[:64]))
        assert set(number.tolist()) == {0, 1, 2, 3}
    emitted = torch.cat([tokens.gather(1, path.clamp(min=0)), token[:, None]], 1)
    emitted[torch.arange(TRIALS), number] = token
    chance = p_value(three_tokens(emitted, number + 1, target), joint(target))
    assert chance > 1e-3 if flaw is None else chance < 1e-9
