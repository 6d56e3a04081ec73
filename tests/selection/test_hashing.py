import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_efficiency.selection.hashing import hash_words, in_batches, n_grams, shingles

ALPHABET = "aB9_ .,;\n\t-é中"


def words_of(text):
    """The definition: runs of word characters or of punctuation, Chinese characters one by one."""
    return re.findall(r"中[a-z0-9_é]*|[a-z0-9_é]+|[^\sa-z0-9_é中]+", text.lower())


@given(st.lists(st.text(ALPHABET, max_size=30), max_size=6), st.integers(1, 4))
def test_equal_hashes_are_equal_runs_of_words(texts, n):
    grams = n_grams(hash_words(texts), n)
    expected = [[tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for words in map(words_of, texts)]
    assert grams.counts.tolist() == [len(runs) for runs in expected]
    by_run = {}
    for run, value in zip([run for runs in expected for run in runs], grams.hashes.tolist(), strict=True):
        assert by_run.setdefault(run, value) == value
    assert len(set(by_run.values())) == len(by_run)


def test_hashes_do_not_depend_on_the_batch():
    alone, among = hash_words(["the cat"]), hash_words(["a dog,", "", "the cat"])
    assert alone.hashes.tolist() == among.document(2).tolist()
    assert among.counts.tolist() == [3, 0, 2]


def test_a_short_text_is_one_shingle():
    grams = shingles(["a b", "", "a b c d", "a b"], 3)
    assert grams.counts.tolist() == [1, 0, 2, 1]
    assert grams.document(0) == grams.document(3)
    assert grams.document(0)[0] not in grams.document(2)


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_nothing_to_hash(texts):
    assert hash_words(texts).counts.tolist() == [0] * len(texts)
    assert n_grams(hash_words(texts), 2).counts.tolist() == [0] * len(texts)


def test_batches_cover_all_texts():
    texts = ["x" * 30_000] * 7
    parts = list(in_batches(texts))
    assert [len(part) for part in parts] == [3, 3, 1]


def test_lower_case_and_large_texts():
    assert hash_words(["ÀB Straße"]).hashes.tolist() == hash_words(["àb straße"]).hashes.tolist()
    grams = hash_words(["word " * 300_000])
    assert len(np.unique(grams.hashes)) == 1
    assert grams.counts.tolist() == [300_000]
