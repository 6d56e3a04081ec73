import pytest
from datasets import Dataset, IterableDataset

from hf_efficiency.selection.pool import Pool, checksum, texts_of


class Numbers:
    """A dataset with length and items alone."""

    def __len__(self):
        return 5

    def __getitem__(self, i):
        if not 0 <= i < 5:
            raise IndexError
        return {"text": str(i)}


def stream():
    return IterableDataset.from_generator(lambda: ({"text": str(i)} for i in range(5)))


@pytest.mark.parametrize(
    "dataset",
    [
        [str(i) for i in range(5)],
        [{"text": str(i), "n": i} for i in range(5)],
        Dataset.from_dict({"text": [str(i) for i in range(5)], "n": list(range(5))}),
        Numbers(),
        stream(),
    ],
    ids=["texts", "rows", "dataset", "map style", "stream"],
)
def test_every_kind_is_read_alike(dataset):
    pool = Pool(dataset)
    assert list(pool.texts(2)) == [["0", "1"], ["2", "3"], ["4"]]
    assert list(pool.texts(2, start=3)) == [["3", "4"]]
    assert len(pool) == 5


def test_other_columns(tiny_tokenizer):
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    assert next(Pool(chat).texts()) == ["a\nb"]
    assert next(Pool([{"prompt": "q", "completion": "r"}]).texts()) == ["q\nr"]
    ids = tiny_tokenizer("hello there")["input_ids"]
    assert next(Pool([{"input_ids": ids}], tokenizer=tiny_tokenizer).texts()) == ["hello there"]
    assert next(Pool([{"body": "x", "text": "y"}], "body").texts()) == ["x"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Pool([]), ValueError, "the dataset is empty: give at least one example"),
        (lambda: Pool("text"), TypeError, "is one text; put texts in a list"),
        (lambda: Pool(iter(["a"])), TypeError, "can be read only once"),
        (lambda: Pool({"train": ["a"]}), ValueError, r"has the splits \['train'\]; choose one"),
        (lambda: Pool(3), TypeError, "is a int, which is neither a sequence nor iterable"),
        (lambda: Pool([3]), TypeError, "a row of the dataset is a int"),
        (lambda: Pool([{"body": "x"}]), ValueError, r"has the columns \['body'\]; name the one with the text"),
        (lambda: Pool([{"text": "x"}], "body"), ValueError, r"columns \['text'\], none of them 'body'"),
        (lambda: next(Pool([{"input_ids": [1]}]).texts()), ValueError, "give the tokenizer that wrote them"),
        (lambda: list(Pool(["a", 3]).texts()), TypeError, "a row is a int"),
        (lambda: next(Pool([{"text": 3}]).texts()), TypeError, "holds a int where a text was expected"),
        (lambda: texts_of([" "]), ValueError, "target holds only empty texts"),
        (lambda: texts_of([]), ValueError, "target: the dataset is empty"),
    ],
)
def test_bad_datasets(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_checksum_sees_every_part():
    assert checksum("a", 1) == checksum("a", 1)
    assert len({checksum("a", 1), checksum("a", 2), checksum("a1"), checksum("a", "1")}) == 4
