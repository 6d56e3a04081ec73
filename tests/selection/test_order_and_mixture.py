import copy

import numpy as np
import pytest
import torch

from hf_efficiency.selection import select
from hf_efficiency.selection.curriculum import Competence, draw_order, length_difficulty
from hf_efficiency.selection.medu import MEDU
from hf_efficiency.selection.plans import CurriculumPlan, MixturePlan, SubsetPlan
from hf_efficiency.selection.signals import to_batch
from hf_efficiency.selection.skill_it import SkillIt, learn_graph
from hf_efficiency.selection.utilimax import UtiliMax
from hf_efficiency.selection.verification import Verification, mean_loss
from tests.tiny import build_llama


def test_competence_by_formula():
    t = np.array([0.0, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(Competence("linear", 0.2, 0.5)(t), [0.2, 0.6, 1, 1])
    np.testing.assert_allclose(Competence("root", 0.2, 0.5)(t), [0.2, np.sqrt(0.5 * (1 - 0.04) + 0.04), 1, 1])
    np.testing.assert_allclose(Competence("geometric", 0.25, 1.0)(t), [0.25, 0.25**0.75, 0.5, 1])
    np.testing.assert_allclose(Competence("step", 0.2, 1.0)(t), [0.2, 0.4, 0.6, 1])


def test_draws_are_easy_enough_and_without_replacement():
    difficulty = np.array([5.0, 1, 4, 2, 3])
    order = draw_order(difficulty, np.ones(10), 0)
    assert sorted(order[:5].tolist()) == sorted(order[5:].tolist()) == [0, 1, 2, 3, 4]
    early = draw_order(difficulty, np.full(4, 0.4), 0)
    assert sorted(early.tolist()) == [1, 1, 3, 3]
    assert draw_order(difficulty, np.ones(10), 0).tolist() == order.tolist()


def test_length_and_rarity():
    pool = ["a b", "a b zebra yak", "a"]
    assert length_difficulty(pool).tolist() == [2, 4, 1]
    assert select(pool, "length", 1).indices.tolist() == [1]
    # 7 words, a three times, b twice
    expected = [-np.log(3 / 7) - np.log(2 / 7), -np.log(3 / 7) - np.log(2 / 7) - 2 * np.log(1 / 7), -np.log(3 / 7)]
    np.testing.assert_allclose(select(pool, "rarity", 1).scores, expected, rtol=1e-5)


@pytest.mark.parametrize("start", [0, 7, 10])
def test_plans_are_functions_of_the_draw(start):
    """In any order, and from a plan made anew, a draw gives the same example."""
    rows = [np.arange(3), np.arange(3, 8)]

    def plans():
        return (
            SubsetPlan(start, np.array([2, 4, 5]), 1),
            CurriculumPlan(start, np.arange(8.0), 1, Competence("linear", 0.3, 0.5), 10, 30),
            MixturePlan(start, np.array([0.3, 0.7]), 1, rows, 10),
        )

    for plan, again in zip(plans(), plans(), strict=True):
        forward = [plan.at(draw) for draw in range(start, 30)]
        assert [again.at(draw) for draw in reversed(range(start, 30))] == forward[::-1]


def test_mixture_goes_through_all_rows_before_it_repeats():
    plan = MixturePlan(0, np.array([0.5, 0.5]), 0, [np.arange(7), np.arange(7, 20)], 14)
    drawn = [plan.at(draw) for draw in range(28)]
    first = [row for row in drawn if row < 7]
    assert sorted(first[:7]) == sorted(first[7:]) == list(range(7))
    second = [row for row in drawn if row >= 7]
    assert len(set(second[:13])) == 13


def test_skill_it_by_formula():
    """p ∝ exp(η Σ_τ A L_τ) over the window."""
    graph = np.array([[1.0, 0.5], [0.0, 2.0]])
    rule = SkillIt(graph, eta=0.2, window=2)
    powers = np.exp(0.2 * graph.sum(1))
    np.testing.assert_allclose(rule.start(), powers / powers.sum())
    rule.update([9.0, 9.0])
    rule.update([3.0, 1.0])
    powers = np.exp(0.2 * graph @ np.array([3.0 + 2.0, 1.0 + 4.0]))
    np.testing.assert_allclose(rule.update([2.0, 4.0]), powers / powers.sum())


def test_learned_graph():
    found = learn_graph([2.0, 4.0], np.array([[1.0, 4.0], [3.0, 1.0]]))
    np.testing.assert_allclose(found, [[0.5, 0], [0, 0.75]])


def test_utilimax_by_hand():
    """A budget of 10: the better source has 2, so four epochs of it are 8 and the rest comes from the other."""
    weights = UtiliMax(max_epochs=4, balance=0).weights(np.array([1.0, 0.2]), np.array([2.0, 100.0]), 10)
    np.testing.assert_allclose(weights, [0.8, 0.2], atol=1e-9)
    # the worst of two tasks alone: equal shares are best
    balanced = UtiliMax(balance=1).weights(np.eye(2), np.array([100.0, 100.0]), 10)
    np.testing.assert_allclose(balanced, [0.5, 0.5], atol=1e-9)
    kept = UtiliMax(balance=0, min_weight=0.1).weights(np.array([1.0, 0.0]), np.array([100.0, 100.0]), 10)
    np.testing.assert_allclose(kept, [0.9, 0.1], atol=1e-9)


def test_medu_is_the_expected_grade(tiny_llama, tiny_tokenizer):
    config = MEDU("answering questions", prompt="{task} {text} :", grades=("Yes", "No"))
    good, bad = config.grade_tokens(tiny_tokenizer) if _differ(config, tiny_tokenizer) else (None, None)
    if good is None:
        config = MEDU("answering questions", prompt="{task} {text} :", grades=("\x01", "\x02"))
        with pytest.raises(ValueError, match="begin with the same token"):
            config.grade_tokens(tiny_tokenizer)
        return
    ids = torch.tensor([tiny_tokenizer("answering questions some text :")["input_ids"]])
    with torch.no_grad():
        logits = tiny_llama(input_ids=ids).logits[0, -1, [good, bad]]
    found = config.score(["some text"], tiny_llama, tiny_tokenizer)
    assert float(found[0]) == pytest.approx(float(logits.softmax(0)[0]), rel=1e-4)


def _differ(config, tokenizer):
    return len({tokenizer(f" {grade}", add_special_tokens=False)["input_ids"][0] for grade in config.grades}) == 2


def test_select_by_medu(tiny_llama, tiny_tokenizer, texts):
    class Grades:
        """A tokenizer in whose eyes each grade is a token of its own."""

        def __call__(self, text, **kwargs):
            words = {" Great": 50, " Good": 51, " Okay": 52, " Poor": 53, " Useless": 54}
            return {"input_ids": [words[text]]} if text in words else tiny_tokenizer(text, **kwargs)

    arguments = {"model": tiny_llama, "tokenizer": Grades(), "max_characters": 40}
    selection = select(texts[:4], "medu", 2, task="answering questions", **arguments)
    assert ((selection.scores > 0) & (selection.scores < 1)).all()
    with pytest.raises(ValueError, match="'medu' needs task=, a sentence"):
        select(texts[:4], "medu", 2, **arguments)


def test_the_cheap_check_prefers_the_evaluations_own_kind():
    model = build_llama(vocab_size=64)
    generator = torch.Generator().manual_seed(0)
    same = to_batch(torch.randint(10, 14, (4, 16), generator=generator).tolist(), "cpu")
    other = to_batch(torch.randint(40, 60, (4, 16), generator=generator).tolist(), "cpu")
    evaluation = [to_batch(torch.randint(10, 14, (4, 16), generator=generator).tolist(), "cpu")]
    before = copy.deepcopy(model.state_dict())
    gains = Verification(steps=8, learning_rate=5e-3).gains(model, {"same": [same], "other": [other]}, evaluation)
    losses = Verification(steps=8, learning_rate=5e-3).losses(
        model, {"same": [same], "other": [other]}, {"same": evaluation, "other": [other]}
    )
    graph = learn_graph(losses[0], np.array(losses[1]))
    assert graph[0, 0] > graph[0, 1]
    assert graph[1, 1] > graph[1, 0]
    assert gains["same"] > 0.5
    assert gains["same"] > gains["other"] + 0.5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert mean_loss(model, evaluation) == pytest.approx(float(model(**evaluation[0]).loss), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Competence(start=0), r"start=0 is a share"),
        (lambda: Competence(length=2), r"length=2 is a share"),
        (lambda: SkillIt(np.ones(2)), r"skill graph has the shape \(2,\)"),
        (lambda: SkillIt(-np.ones((2, 2))), "finite, not negative, and not all zero"),
        (lambda: SkillIt(np.ones((1, 1)), eta=0), "eta=0 must be positive"),
        (lambda: SkillIt(np.ones((1, 1)), window=0), "window=0 must be at least 1"),
        (lambda: SkillIt(np.ones((1, 1))).update([1, 2]), "2 losses for a graph of 1 evaluated skills"),
        (lambda: SkillIt(np.ones((1, 1))).update([np.nan]), "the loss of skill 0 is not finite"),
        (lambda: learn_graph([1.0], np.ones((2, 2))), r"shape \(2, 2\); expected \(training skills, 1\)"),
        (lambda: learn_graph([0.0], np.ones((2, 1))), "must be positive"),
        (lambda: UtiliMax(max_epochs=0), "max_epochs=0 must be positive"),
        (lambda: UtiliMax(balance=2), r"balance=2 must lie in \[0, 1\]"),
        (lambda: UtiliMax().weights(np.ones(2), np.ones(3), 1), r"utility has the shape \(2, 1\) and sizes \(3,\)"),
        (lambda: UtiliMax().weights(np.array([np.nan]), np.ones(1), 1), "utilities must be finite"),
        (lambda: UtiliMax().weights(np.ones(2), np.ones(2), 100), "budget of 100 is above 2 in all sources"),
        (lambda: UtiliMax(min_weight=0.6).weights(np.ones(2), np.ones(2), 1), "min_weight=0.6 is more than each"),
        (lambda: MEDU(" "), "task is empty"),
        (lambda: MEDU("x", prompt="{text}"), r"the prompt lacks \{task\}"),
        (lambda: MEDU("x", grades=("a",)), "must be at least two"),
        (lambda: Verification(steps=0), "steps=0 must be at least 1"),
        (lambda: Verification(learning_rate=0), "learning_rate=0 must be positive"),
        (lambda: Verification().gains(None, {}, []), "needs at least one candidate"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
