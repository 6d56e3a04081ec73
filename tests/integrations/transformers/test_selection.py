import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

from hf_efficiency import CurriculumCallback, DataSelectionCallback, MixtureCallback, select
from hf_efficiency.integrations.transformers.selection_steering import SteeredSampler
from hf_efficiency.selection.skill_it import SkillIt
from tests.tiny import build_llama

ROWS, TOKENS = 24, 12


def build_dataset():
    """24 rows of 12 tokens; the first token of row i is 10 + i, so that a batch says which rows it has."""
    ids = torch.randint(100, 380, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 10 + torch.arange(ROWS)
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})


@pytest.fixture(scope="module")
def dataset():
    return build_dataset()


class Recorder(TrainerCallback):
    """Keeps the rows of every batch that the model trained on."""

    def __init__(self):
        self.rows = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def hook(module, arguments, keywords):
            if module.training:
                self.rows.append((keywords["input_ids"][:, 0] - 10).tolist())

        self.handle = model.register_forward_pre_hook(hook, with_kwargs=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.handle.remove()


def collate(rows):
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
    return {**batch, "labels": batch["input_ids"].clone()}


def train(dataset, tmp_path, *callbacks, resume=None, model=None, **arguments):
    """(rows of each batch, trained model, trainer)"""
    settings = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    recorder = Recorder()
    model = build_llama() if model is None else model
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=dataset,
        data_collator=collate,
        callbacks=[*callbacks, recorder],
    )
    trainer.train(resume_from_checkpoint=resume)
    return recorder.rows, model, trainer


def flat(batches):
    return [row for batch in batches for row in batch]


def given(**arguments):
    """Keeps rows 0 to 11, whose scores are the highest."""
    return DataSelectionCallback("entropy", scores=np.arange(ROWS, 0, -1), **arguments)


def test_trains_on_the_chosen_rows_alone_and_as_long(dataset, tmp_path):
    rows, _, trainer = train(dataset, tmp_path, given())
    assert trainer.state.global_step == 24
    assert sorted(flat(rows)) == sorted(list(range(12)) * 4)
    # every round of 12 draws has each row once, in another order
    rounds = [flat(rows)[i : i + 12] for i in range(0, 48, 12)]
    assert all(sorted(part) == list(range(12)) for part in rounds)
    assert len({tuple(part) for part in rounds}) == 4


def test_warmup_is_on_all_rows_and_the_plan_holds_from_the_first_batch_not_fetched(dataset, tmp_path):
    callback = given(warmup=3)
    rows, _, _ = train(dataset, tmp_path, callback)
    # at the end of step 3 the dataloader has fetched batch 4
    assert callback.report["start"] == 8
    assert set(flat(rows[4:])) == set(range(12))
    assert len(set(flat(rows[:4]))) == 8


def test_accumulation_and_workers_shift_the_start_and_nothing_else(dataset, tmp_path):
    callback = given(warmup=2)
    rows, _, _ = train(
        dataset, tmp_path, callback, gradient_accumulation_steps=2, dataloader_num_workers=1, num_train_epochs=1
    )
    start = callback.report["start"]
    assert start >= 10
    assert set(flat(rows)[start:]) <= set(range(12))
    assert len(flat(rows)) == ROWS


@pytest.mark.parametrize("strategy", ["loss", "d2", "el2n", "grand", "perplexity", "entropy", "variation-ratio"])
def test_scores_of_the_model_in_training(dataset, tmp_path, strategy):
    settings = {"neighbors": 0} if strategy == "d2" else {}
    callback = DataSelectionCallback(strategy, fraction=0.25, every="epoch", **settings)
    model = build_llama()
    expected = select(dataset, strategy, 6, model=model, tokenizer=object(), **settings).scores
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows, _, _ = train(dataset, tmp_path, callback, model=model, learning_rate=1e-9, num_train_epochs=1)
    np.testing.assert_allclose(callback.selection.scores, expected, rtol=1e-4)
    assert set(flat(rows)) == set(callback.selection.indices.tolist())
    assert len(set(flat(rows))) == 6
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=1e-5, rtol=1e-4)


def test_scoring_leaves_training_as_it_is(dataset, tmp_path):
    """With all rows kept, scores of the model change nothing to the bit, though its dropout is active."""
    callbacks = given(fraction=1.0), DataSelectionCallback("loss", fraction=1.0, low=0.0, high=1.0)
    models = [
        train(dataset, tmp_path, callback, model=build_llama(attention_dropout=0.3), max_steps=2)[1]
        for callback in callbacks
    ]
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)


def test_average_of_rounds(dataset, tmp_path):
    callback = DataSelectionCallback("el2n", fraction=0.5, every="epoch", average=True)
    single = []
    original = callback._scores

    def watched(model):
        result = original(model)
        single.append(result)
        return result

    callback._scores = watched
    train(dataset, tmp_path, callback)
    assert callback._rounds == 2
    np.testing.assert_allclose(callback._sum / 2, single[1], rtol=1e-6)
    assert not np.allclose(single[0], single[1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: given(warmup=2),
        lambda: DataSelectionCallback("loss", every=5, warmup=2),
        lambda: DataSelectionCallback("el2n", every="epoch", average=True),
        lambda: CurriculumCallback("loss", every=4),
        lambda: CurriculumCallback(np.arange(ROWS), pace="linear"),
        lambda: MixtureCallback(["a", "b"] * (ROWS // 2), {"a": 0.75, "b": 0.25}),
    ],
)
@pytest.mark.parametrize("step", [7, 12])
def test_resume_repeats_the_run_to_the_bit(dataset, tmp_path, make, step):
    arguments = {"save_strategy": "steps", "save_steps": step, "max_steps": 16}
    rows, whole, _ = train(dataset, tmp_path, make(), **arguments)
    checkpoint = str(tmp_path / "out" / f"checkpoint-{step}")
    again, resumed, _ = train(dataset, tmp_path, make(), resume=checkpoint, **arguments)
    assert again == rows[step:]
    for first, second in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(first, second)


def test_resume_with_another_selection_is_refused(dataset, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 5, "max_steps": 5}
    train(dataset, tmp_path, given(), **arguments)
    checkpoint = str(tmp_path / "out" / "checkpoint-5")
    with pytest.raises(
        ValueError, match=r"another selection .*strategy, its settings, the seed, the dataset or the batch"
    ):
        train(dataset, tmp_path, given(fraction=0.25), resume=checkpoint, max_steps=8)
    with pytest.raises(ValueError, match=r"curriculum.safetensors' is not there: the checkpoint was saved without"):
        train(dataset, tmp_path, CurriculumCallback(np.arange(ROWS)), resume=checkpoint, max_steps=8)


def test_resume_from_a_folder_elsewhere(dataset, tmp_path):
    train(dataset, tmp_path, given(), save_strategy="steps", save_steps=5, max_steps=5)
    moved = (tmp_path / "out" / "checkpoint-5").rename(tmp_path / "moved")
    arguments = {"resume": str(moved), "max_steps": 8, "output_dir": str(tmp_path / "new")}
    rows, _, _ = train(dataset, tmp_path, given(checkpoint=moved), **arguments)
    assert len(rows) == 3


def test_the_sampler_is_given_back(dataset, tmp_path):
    _, _, trainer = train(dataset, tmp_path, given(), max_steps=2)
    batches = trainer.callback_handler.train_dataloader.batch_sampler
    assert not isinstance(batches.sampler, SteeredSampler)


def test_influence_of_the_model_in_training(dataset, tmp_path):
    """The rows that are the target themselves help it most; no tokenizer is needed for tokenized rows."""
    target = dataset.select([3, 8, 20])
    callback = DataSelectionCallback("influence", fraction=0.125, target=target, every="epoch", rank=4)
    rows, _, _ = train(dataset, tmp_path, callback, num_train_epochs=1)
    assert set(flat(rows)) == {3, 8, 20}


def test_static_strategies_decode_the_rows(tmp_path, tiny_tokenizer, texts):
    rows = [*texts[:6], *(["zq xv jk " * 8] * 6)]
    encoded = tiny_tokenizer(rows, truncation=True, max_length=24)
    data = Dataset.from_dict({"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]})
    callback = DataSelectionCallback("dsir", fraction=0.5, target=texts[6:20], temperature=0.0)
    trainer = Trainer(
        model=build_llama(vocab_size=len(tiny_tokenizer)),
        args=TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no"),
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer, mlm=False),
        processing_class=tiny_tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    assert sorted(callback.selection.indices.tolist()) == list(range(6))


def test_works_in_sft_trainer(tmp_path, tiny_tokenizer, texts):
    from trl import SFTConfig, SFTTrainer

    recorder, callback = Recorder(), DataSelectionCallback("loss", fraction=0.5, every="epoch")
    settings = {"max_length": 16, "max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "no"}
    trainer = SFTTrainer(
        model=build_llama(vocab_size=len(tiny_tokenizer)),
        args=SFTConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, **settings),
        train_dataset=Dataset.from_dict({"text": texts[:8]}),
        processing_class=tiny_tokenizer,
        callbacks=[callback, recorder],
    )
    trainer.train()
    chosen = {trainer.train_dataset[int(i)]["input_ids"][0] - 10 for i in callback.selection.indices}
    assert len(callback.selection) == 4
    assert set(flat(recorder.rows)) <= chosen


def test_curriculum_goes_from_easy_to_hard(dataset, tmp_path):
    difficulty = np.random.default_rng(0).permutation(ROWS)
    rows, _, _ = train(dataset, tmp_path, CurriculumCallback(difficulty, pace="linear", start=0.25, length=1.0))
    drawn = difficulty[flat(rows)]
    limits = np.ceil((0.25 + 0.75 * np.arange(48) / 48) * ROWS)
    assert (drawn < limits).all()
    assert drawn[:12].mean() < drawn[-12:].mean()
    hard_first = CurriculumCallback(difficulty, pace="linear", start=0.25, length=1.0, descending=True)
    rows, _, _ = train(dataset, tmp_path, hard_first)
    assert difficulty[flat(rows)][0] >= ROWS - 6


def test_mixture_has_its_shares_in_every_epoch(dataset, tmp_path):
    sources = np.array(["a"] * 6 + ["b"] * 6 + ["c"] * 12)
    rows, _, _ = train(dataset, tmp_path, MixtureCallback(sources, {"a": 3, "b": 1}))
    for epoch in (flat(rows)[:24], flat(rows)[24:]):
        assert {name: int((sources[epoch] == name).sum()) for name in "abc"} == {"a": 18, "b": 6, "c": 0}
    drawn_of_a = [row for row in flat(rows) if row < 6]
    assert sorted(drawn_of_a) == sorted(list(range(6)) * 6)


def test_skill_it_follows_the_losses(dataset, tmp_path):
    sources = ["a"] * 12 + ["b"] * 12
    evaluation = {"a": dataset.select(range(4)), "b": dataset.select(range(12, 16))}
    callback = MixtureCallback(sources, SkillIt(np.eye(2), eta=0.5), evaluation=evaluation, every=4)
    model = build_llama()
    train(dataset, tmp_path, callback, model=model, max_steps=9)
    assert len(callback.skill_it.losses) == 3  # the window: before training, and after steps 4 and 8
    losses = np.sum(list(callback.skill_it.losses), axis=0)
    powers = np.exp(0.5 * (losses - losses.max()))
    expected = dict(zip("ab", (powers / powers.sum()).tolist(), strict=True))
    assert callback.report["weights"] == pytest.approx(expected)


def test_two_callbacks_do_not_steer_one_dataloader(dataset, tmp_path):
    with pytest.raises(ValueError, match="another callback steers this dataloader already"):
        train(dataset, tmp_path, given(), CurriculumCallback(np.arange(ROWS)))


def test_streams_and_batch_samplers_are_refused(dataset, tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from dataset

    with pytest.raises(ValueError, match="is a stream, which has no sampler to steer: choose the data beforehand"):
        train(Stream(), tmp_path, given(), max_steps=1)
    with pytest.raises(ValueError, match=r"BatchRebalanceSampler has no sampler to steer"):
        train(dataset, tmp_path, given(), train_sampling_strategy="batch_rebalance")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataSelectionCallback("best"), r"strategy 'best' is unknown; there are random, dsir"),
        (lambda: DataSelectionCallback("loss", fraction=0.0), r"fraction=0.0 is a share .* \(0, 1\]"),
        (lambda: DataSelectionCallback("loss", fraction=2), r"fraction=2 is a share"),
        (lambda: DataSelectionCallback("loss", every=0), r"every=0 must be a number of steps of at least 1, 'epoch'"),
        (lambda: DataSelectionCallback("loss", warmup=-1), r"warmup=-1 must not be negative"),
        (lambda: DataSelectionCallback("dsir"), r"'dsir' needs target=, texts or a dataset"),
        (lambda: DataSelectionCallback("length", every=3), r"every=3: the scores of 'length' do not change"),
        (lambda: DataSelectionCallback("loss", every=3, scores=[1.0]), r"given scores do not change"),
        (lambda: DataSelectionCallback("minhash"), r"'minhash' removes duplicates; do that beforehand"),
        (lambda: CurriculumCallback("hardness"), r"difficulty='hardness' is unknown: use a number for each"),
        (lambda: CurriculumCallback("length", every=2), r"every=2: this difficulty does not change"),
        (lambda: CurriculumCallback("length", pace="fast"), r"pace='fast' is unknown: use 'root'"),
        (lambda: MixtureCallback([], {}), r"sources is empty"),
        (lambda: MixtureCallback(["a"], {"b": 1}), r"weights name 'b', but the sources are \['a'\]"),
        (lambda: MixtureCallback(["a"], {"a": -1}), r"must be finite, not negative, and not all zero"),
        (lambda: MixtureCallback(["a"], SkillIt(np.eye(1))), r"SkillIt needs evaluation=.* and every="),
        (
            lambda: MixtureCallback(["a"], SkillIt(np.eye(2)), evaluation={"x": [1], "y": [1]}, every=1),
            r"skill graph has the shape \(2, 2\), but there are 1 sources",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (DataSelectionCallback("loss", scores=[1.0, 2.0]), r"scores have the shape \(2,\), but .* has 24 examples"),
        (DataSelectionCallback("loss", scores=[np.nan] * ROWS), r"holds NaN for 24 of 24 rows"),
        (CurriculumCallback([1.0]), r"difficulty has the shape \(1,\), but the training dataset has 24"),
        (MixtureCallback(["a"], {"a": 1}), r"sources names 1 examples, but the training dataset has 24"),
    ],
)
def test_values_of_another_dataset(dataset, tmp_path, callback, message):
    with pytest.raises(ValueError, match=message):
        train(dataset, tmp_path, callback)


@pytest.mark.parametrize(("strategy", "cure"), [("d2", "neighbors=0"), ("length", "scores= made beforehand")])
def test_strategies_that_read_texts_need_a_tokenizer(dataset, tmp_path, strategy, cure):
    with pytest.raises(ValueError, match=rf"has no tokenizer to decode them: pass processing_class= .*{cure}"):
        train(dataset, tmp_path, DataSelectionCallback(strategy))


def test_random_is_drawn_anew_each_epoch(dataset, tmp_path):
    rows, _, _ = train(dataset, tmp_path, DataSelectionCallback("random", fraction=0.25, every="epoch"))
    first, second = set(flat(rows)[:24]), set(flat(rows)[24:])
    assert len(first) == len(second) == 6
    assert first != second


def test_nan_scores_stop_the_training(dataset, tmp_path):
    model = build_llama()
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"scores of the training dataset holds NaN .* float32 or bfloat16"):
        train(dataset, tmp_path, DataSelectionCallback("loss"), model=model)


def test_flattening_collators_are_refused(dataset, tmp_path, monkeypatch):
    def flatten(rows):
        ids = torch.tensor([[token for row in rows for token in row["input_ids"]]])
        return {"input_ids": ids, "labels": ids.clone()}

    monkeypatch.setitem(globals(), "collate", flatten)
    with pytest.raises(ValueError, match=r"turns 4 examples into 1 rows.*padding_free"):
        train(dataset, tmp_path, DataSelectionCallback("loss"))


@pytest.mark.slow
def test_two_processes_train_on_the_same_selection(dataset, tmp_path):
    """Both make the same plan from scores that each has half of, and together draw what one process would."""
    script = Path(__file__).parent / "selection_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2))
    assert first["chosen"] == second["chosen"]
    assert first["start"] == second["start"]
    batches = [batch for pair in zip(first["rows"], second["rows"], strict=True) for batch in pair]
    start = first["start"]
    assert set(flat(batches)[start:]) <= set(first["chosen"])
    single = DataSelectionCallback("loss", warmup=2, low=0.0, high=0.5)
    arguments = {"max_steps": 8, "learning_rate": 0.0, "per_device_train_batch_size": 4}
    rows, _, _ = train(dataset, tmp_path, single, **arguments)
    assert single.selection.indices.tolist() == first["chosen"]
    assert flat(rows) == flat(batches)
