"""Caches of a teacher: what they hold, how they are found, resumed and refused."""

import json

import pytest
import torch

from hf_efficiency.distillation.cache_writer import cache_teacher
from hf_efficiency.distillation.teacher_cache import MANIFEST, TeacherCache, sequence_key
from hf_efficiency.distillation.vocabulary import shared_vocabulary
from tests import tiny
from tests.families import build_family

K = 16


@pytest.fixture(scope="module")
def sequences():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 256, (n,), generator=generator).tolist() for n in (9, 12, 5, 12, 2, 7, 12)]


@pytest.fixture(scope="module")
def teacher():
    return tiny.build_llama()


@pytest.fixture(scope="module")
def cache(teacher, sequences, tmp_path_factory):
    return cache_teacher(
        teacher, sequences, tmp_path_factory.mktemp("c") / "cache", top_k=K, shard_size=3, batch_size=2
    )


def test_holds_what_the_teacher_says(cache, teacher, sequences):
    assert len(cache) == 7
    assert sorted(p.name for p in cache.folder.glob("*.arrow")) == [f"shard-0000{i}.arrow" for i in range(3)]
    for ids in sequences:
        p = teacher(torch.tensor([ids])).logits[0, :-1].softmax(-1)
        rows = cache.rows(torch.tensor(ids))
        expected, top = p.topk(K)
        assert torch.equal(rows.ids, top)
        torch.testing.assert_close(rows.log_p, expected.log(), rtol=1e-3, atol=1e-3)  # float16
        torch.testing.assert_close(rows.log_rest.exp(), 1 - expected.sum(-1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_lookup_of_a_padded_batch(cache, sequences, side):
    chosen = [sequences[i] for i in (5, 1, 4)]
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for i, row in enumerate(chosen):
        where = slice(0, len(row)) if side == "right" else slice(12 - len(row), 12)
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    valid = (mask[:, 1:] * mask[:, :-1]).bool()
    valid[0, :3] = False
    found = cache.lookup(ids, mask, valid)
    assert len(found.ids) == valid.sum()
    skipped = 6 - int(valid[0].sum())
    expected = torch.cat([cache.rows(torch.tensor(row)).log_p[skipped * (i == 0) :] for i, row in enumerate(chosen)])
    assert torch.equal(found.log_p, expected)


def test_cached_sequences_are_a_dataset(cache, sequences):
    data = cache.dataset()
    assert [data[i]["input_ids"] for i in range(len(data))] == sequences
    assert data[-1]["labels"] == sequences[-1]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_any_decoder(family, sequences, tmp_path):
    """Gemma 2 caps its logits after the head."""
    model = build_family(family)
    rows = cache_teacher(model, sequences[:2], tmp_path / "cache", top_k=4).rows(torch.tensor(sequences[1]))
    expected = model(torch.tensor([sequences[1]])).logits[0, :-1].log_softmax(-1).topk(4)
    assert torch.equal(rows.ids, expected.indices)
    torch.testing.assert_close(rows.log_p, expected.values, rtol=1e-3, atol=1e-3)


def test_interrupted_run_goes_on(teacher, sequences, cache, tmp_path, monkeypatch):
    from hf_efficiency.distillation import cache_writer

    ran, write = [], cache_writer._write_shard

    def failing(model, chosen, path, *rest):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(path.name)
        write(model, chosen, path, *rest)

    monkeypatch.setattr(cache_writer, "_write_shard", failing)
    folder, settings = tmp_path / "cache", {"top_k": K, "shard_size": 3, "batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(teacher, sequences, folder, **settings)
    with pytest.raises(ValueError, match="is not finished: run cache-teacher with the same arguments again"):
        TeacherCache(folder)
    with pytest.raises(ValueError, match="made otherwise: top_k \\(16 there, 8 here\\)"):
        cache_teacher(teacher, sequences, folder, **{**settings, "top_k": 8})
    monkeypatch.setattr(cache_writer, "_write_shard", lambda *args: (ran.append(args[2].name), write(*args)))
    found = cache_teacher(teacher, sequences, folder, **settings)
    assert ran == [f"shard-0000{i}.arrow" for i in range(3)]  # none twice
    for ids in sequences:
        assert torch.equal(found.rows(torch.tensor(ids)).log_p, cache.rows(torch.tensor(ids)).log_p)
    cache_teacher(teacher, sequences, folder, **settings)
    assert len(ran) == 3  # finished: only opened


def test_other_teacher_data_or_tokenizer_are_noticed(teacher, sequences, tiny_tokenizer, texts, tmp_path):
    folder = tmp_path / "cache"
    cache = cache_teacher(teacher, sequences, folder, top_k=4, tokenizer=tiny_tokenizer)
    cache.check_tokenizer(tiny_tokenizer)
    other = tiny.build_tokenizer(texts[:5], 300)
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        cache.check_tokenizer(other)
    for name, arguments in {
        "teacher": (tiny.build_llama(seed=1), sequences, tiny_tokenizer),
        "data": (teacher, sequences[::-1], tiny_tokenizer),
        "tokenizer": (teacher, sequences, other),
    }.items():
        model, data, tokenizer = arguments
        with pytest.raises(ValueError, match=f"made otherwise: {name} "):
            cache_teacher(model, data, folder, top_k=4, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"A sequence of the data \(3 tokens\) is not in the teacher cache"):
        cache.check_data([torch.tensor(sequences[0]), torch.tensor([4, 5, 6])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequences": []}, "The data is empty or holds a sequence of fewer than 2 tokens"),
        ({"sequences": [[5]]}, "fewer than 2 tokens"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_k": 384}, "top_k=384 must be below the vocabulary's 384"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"shard_size": 0}, "shard_size=0 must be at least 1"),
    ],
)
def test_bad_settings(teacher, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        cache_teacher(teacher, **{"sequences": [[5, 6]], "folder": tmp_path / "cache", **arguments})
    assert not (tmp_path / "cache").exists()


def test_folders_that_are_no_caches(teacher, tmp_path):
    with pytest.raises(ValueError, match=f"holds no teacher cache \\({MANIFEST} is missing\\)"):
        TeacherCache(tmp_path)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not empty and holds no teacher cache"):
        cache_teacher(teacher, [[5, 6]], tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"version": 99}))
    with pytest.raises(ValueError, match="is of version 99, this code reads 1"):
        TeacherCache(tmp_path)


def test_key_is_that_of_the_values():
    assert sequence_key([1, 2]) == sequence_key(torch.tensor([1, 2], dtype=torch.int32)) != sequence_key([2, 1])


# Vocabularies.


def test_padded_embeddings_of_one_tokenizer(tiny_tokenizer):
    assert shared_vocabulary(384, 384) == 384
    assert shared_vocabulary(384, 448, tiny_tokenizer) == 384
    assert shared_vocabulary(512, 384, tiny_tokenizer, tiny_tokenizer) == 384
    assert shared_vocabulary(512, 384, vocab_size=300) == 300


def test_vocabularies_that_do_not_match(tiny_tokenizer, texts):
    other = tiny.build_tokenizer(texts[:5], 300)
    with pytest.raises(ValueError, match=r"different tokenizers .* TRL's GOLD trainer"):
        shared_vocabulary(384, 384, tiny_tokenizer, other)
    with pytest.raises(ValueError, match=r"has 384 logits a token and the teacher 448.*GOLD"):
        shared_vocabulary(384, 448)
    with pytest.raises(ValueError, match=r"has 384 logits a token and the teacher 300.*GOLD"):
        shared_vocabulary(384, 300, tiny_tokenizer)
    with pytest.raises(ValueError, match="vocab_size=400 must be from 1 to 384"):
        shared_vocabulary(384, 448, vocab_size=400)
