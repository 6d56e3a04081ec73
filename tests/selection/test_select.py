import numpy as np
import pytest
from datasets import Dataset, IterableDataset

import hf_efficiency
from hf_efficiency.selection import STRATEGIES, Selection, scoring, select
from hf_efficiency.selection.pool import Pool
from hf_efficiency.selection.scoring import ScoreCache, score_pool

POOL = [f"text number {i} " + "word " * i for i in range(50)]


def test_selection_of_a_dataset():
    dataset = Dataset.from_dict({"text": POOL})
    selection = hf_efficiency.select(dataset, "length", 5)
    assert isinstance(selection, hf_efficiency.Selection)
    assert selection.indices.tolist() == [49, 48, 47, 46, 45]
    assert selection.apply(dataset)["text"][:] == POOL[:-6:-1]
    assert selection.apply(POOL) == POOL[:-6:-1]
    assert selection.weights.tolist() == [1] * 5
    assert selection.report["pool"] == 50
    with pytest.raises(ValueError, match="the dataset has 2 rows, but 50 were scored"):
        selection.apply(POOL[:2])


def test_scores_ride_in_a_column_of_the_dataset(monkeypatch):
    dataset = Dataset.from_dict({"text": POOL})
    first = select(dataset, "dsir", 5, target=["text number"])
    kept = first.with_scores(dataset)
    assert first.column.startswith("dsir_")
    assert first.column in kept.column_names
    assert first.with_scores(kept) is kept
    monkeypatch.setattr("hf_efficiency.selection.scorers.DSIR.score", None)
    again = select(kept, "dsir", 5, target=["text number"])
    np.testing.assert_array_equal(again.scores, first.scores)
    assert again.indices.tolist() == first.indices.tolist()
    # another setting, another target, other data: another column
    others = [
        {"target": ["text number"], "max_n": 1},
        {"target": ["other"]},
    ]
    monkeypatch.undo()
    columns = {select(dataset, "dsir", 5, **arguments).column for arguments in others}
    columns.add(select(dataset.select(range(49)), "dsir", 5, target=["text number"]).column)
    assert len(columns | {first.column}) == 4
    with pytest.raises(TypeError, match="a list has no columns"):
        first.with_scores(POOL)


def test_a_stream_is_read_in_batches():
    stream = IterableDataset.from_generator(lambda: ({"text": text} for text in POOL))
    listed, streamed = (select(data, "dsir", 0.2, target=["text number"]) for data in (POOL, stream))
    assert listed.indices.tolist() == streamed.indices.tolist()
    np.testing.assert_array_equal(listed.scores, streamed.scores)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "_PART_ROWS", 10)
    whole = select(POOL, "length", 5)
    seen = []

    def failing(texts):
        seen.append(len(texts))
        if sum(seen) > 25:
            raise KeyboardInterrupt
        return np.array([len(text) for text in texts])

    cache = ScoreCache(tmp_path, "key")
    with pytest.raises(KeyboardInterrupt):
        score_pool(Pool(POOL), failing, batch_size=5, cache=cache)
    assert len(ScoreCache(tmp_path, "key").load()) == 20
    seen.clear()
    scores = score_pool(
        Pool(POOL), lambda texts: seen.append(len(texts)) or [len(text) for text in texts], batch_size=5, cache=cache
    )
    assert sum(seen) == 30
    assert scores.tolist() == [len(text) for text in POOL]
    first = select(POOL, "length", 5, cache_dir=tmp_path / "scores")
    monkeypatch.setattr("hf_efficiency.selection.scorers.length_difficulty", None)
    again = select(POOL, "length", 5, cache_dir=tmp_path / "scores")
    assert first.indices.tolist() == again.indices.tolist() == whole.indices.tolist()


def test_resume_with_another_selection_is_refused(tmp_path):
    select(POOL, "dsir", 5, target=["a"], cache_dir=tmp_path)
    for strategy, arguments in (("dsir", {"target": ["b"]}), ("dsir", {"target": ["a"], "max_n": 1}), ("length", {})):
        with pytest.raises(ValueError, match=r"holds scores of another selection \(checksum [0-9a-f]{12}, this one is"):
            select(POOL, strategy, 5, cache_dir=tmp_path, **arguments)


def test_every_strategy_has_a_line_and_refuses_unknown_settings():
    for name, strategy in STRATEGIES.items():
        assert strategy.summary
        with pytest.raises(ValueError, match=f"the strategy '{name}' has no setting 'colour'"):
            select(POOL, name, 1, colour="red")


@pytest.mark.parametrize("strategy", ["random", "length", "rarity", "dpp", "kmeans", "hybrid"])
def test_same_arguments_same_rows(strategy):
    first, second = (select(POOL, strategy, 10, seed=3).indices.tolist() for _ in range(2))
    assert first == second
    assert len(set(first)) == 10
    if strategy in ("random", "kmeans"):
        assert select(POOL, strategy, 10, seed=4).indices.tolist() != first


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((POOL, "best", 5), ValueError, "the strategy 'best' is unknown; there are random, dsir"),
        (([], "length", 5), ValueError, "the dataset is empty"),
        ((POOL, "length", 51), ValueError, "k=51 is above the pool of 50 rows: choose at most 50"),
        ((POOL, "length", 0), ValueError, "k=0 must be at least 1"),
        ((POOL, "length"), ValueError, "the strategy 'length' needs k, the number or the share"),
        ((POOL, "dsir", 5), ValueError, "'dsir' needs target=, texts or a dataset of what is wanted"),
        ((POOL, "perplexity", 5), ValueError, "'perplexity' needs model=, a causal language model and tokenizer="),
        ((POOL, "influence", 5), ValueError, "'influence' needs model=.* and target=.* and tokenizer="),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        select(*arguments)


def test_bad_targets_and_sizes():
    with pytest.raises(ValueError, match="target holds only empty texts"):
        select(POOL, "dsir", 5, target=[""])
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        select(POOL, "length", 5, batch_size=0)


def test_nan_scores_are_refused(tiny_llama, tiny_tokenizer):
    tiny_llama.lm_head.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"the scores of 'loss' holds NaN for 50 of 50 rows \(first: row 0\)"):
        select(POOL, "loss", 5, model=tiny_llama, tokenizer=tiny_tokenizer, max_length=8)


def test_selection_stands_alone():
    assert len(Selection(np.arange(3), np.ones(3), np.ones(5))) == 3
