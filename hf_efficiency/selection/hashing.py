"""Words and their n-grams as 64-bit hashes, many documents at a time, in numpy.

A batch of documents is one array of bytes. Words are found where the class of the characters changes, and the hash of
a word is a difference of prefix sums, so that no step runs word by word in Python. Shape legend: n documents, w words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

_SPACE, _WORD, _MARK = 0, 1, 2
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_MULTIPLIER, -1, 1 << 64)
_NEXT = np.uint64(0xD1B54A32D192ED03)  # weight of one more word in an n-gram
_BATCH_BYTES = 1 << 16
_BLOCK = 1 << 14


def _character_classes() -> NDArray[np.uint8]:
    classes = np.full(256, _WORD, np.uint8)  # letters of other alphabets are words, whatever their bytes
    for code in range(128):
        character = chr(code)
        if not (character.isalnum() or character == "_"):
            classes[code] = _SPACE if character.isspace() or code < 32 else _MARK
    return classes


_CLASSES = _character_classes()


@dataclass(frozen=True)
class Grams:
    """Hashes of a batch of documents.

    Attributes:
        hashes: (w,) uint64, the documents one after the other.
        offsets: (n + 1,) int64; document i has `hashes[offsets[i]:offsets[i + 1]]`.
    """

    hashes: NDArray[np.uint64]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, hashes: NDArray[np.uint64], counts: NDArray[np.int64]) -> Grams:
        """From the number of hashes of each document, (n,)."""
        return cls(hashes, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> NDArray[np.int64]:
        """Hashes of each document, (n,)."""
        return np.diff(self.offsets)

    @property
    def documents(self) -> NDArray[np.int64]:
        """The document of each hash, (w,)."""
        return np.repeat(np.arange(len(self)), self.counts)

    def document(self, i: int) -> NDArray[np.uint64]:
        """The hashes of document i."""
        return self.hashes[self.offsets[i] : self.offsets[i + 1]]


def hash_words(texts: Sequence[str]) -> Grams:
    """The words of each text in lower case, a run of punctuation being a word as well, as in DSIR's tokenizer.

    Characters of scripts that put no spaces between words (Chinese, Japanese, Korean) are words of their own.
    """
    encoded = [text.lower().encode("utf-8", "surrogatepass") for text in texts]
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    ends = np.cumsum(lengths + 1)
    if not len(encoded) or ends[-1] == len(encoded):
        return Grams(np.empty(0, np.uint64), np.zeros(len(encoded) + 1, np.int64))
    data = np.frombuffer(b"\n".join(encoded) + b"\n", np.uint8)
    classes = _CLASSES[data]
    changes = np.empty(len(data), bool)
    changes[0] = True
    np.not_equal(classes[1:], classes[:-1], out=changes[1:])
    boundaries = changes | ((data >= 0xE3) & (data <= 0xED))
    edges = np.flatnonzero(boundaries)
    words = classes[edges] != _SPACE
    starts, stops = edges[words], np.append(edges[1:], len(data))[words]
    powers, inverses = _powers(_table_size(len(data)))
    prefix = np.empty(len(data) + 1, np.uint64)
    prefix[0] = 0
    # a byte counts as one more than its value, so that no byte is lost in the sum
    np.cumsum(powers[: len(data)] * (data.astype(np.uint64) + np.uint64(1)), out=prefix[1:])
    hashes = mix((prefix[stops] - prefix[starts]) * inverses[starts])
    return Grams(hashes, np.concatenate([[0], np.searchsorted(starts, ends)]).astype(np.int64))


def n_grams(words: Grams, n: int) -> Grams:
    """Hashes of the runs of `n` words inside each document; a document of fewer words has none."""
    if n == 1:
        return words
    total = max(0, len(words.hashes) - n + 1)
    hashes = words.hashes[:total].copy()
    for i in range(1, n):
        hashes *= _NEXT
        hashes += words.hashes[i : i + total]
    first = np.ones(len(words.hashes), bool)
    # the last n - 1 words of a document begin no run
    ends = words.offsets[1:]
    for i in range(1, n):
        first[np.maximum(ends - i, words.offsets[:-1])[words.counts > 0]] = False
    short = words.counts < n
    if short.any():
        first[np.repeat(short, words.counts)] = False
    kept = first[:total]
    counts = np.maximum(words.counts - (n - 1), 0)
    return Grams.of(mix(hashes[kept]), counts)


def runs_up_to(texts: Sequence[str], n: int) -> Iterator[Grams]:
    """Runs of one word of each text, of two, and so on to `n`."""
    words = hash_words(texts)
    return (n_grams(words, i) for i in range(1, n + 1))


def flat_runs(texts: Sequence[str], n: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The document and the hash of all of `runs_up_to`, each (w,)."""
    grams = list(runs_up_to(texts, n))
    return np.concatenate([g.documents for g in grams]), np.concatenate([g.hashes for g in grams])


def buckets(hashes: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
    """Where each hash falls in a table of `count` buckets, (w,)."""
    return (hashes % np.uint64(count)).astype(np.int64)


def shingles(texts: Sequence[str], n: int) -> Grams:
    """Runs of `n` words of each text; a text of fewer words counts as one shorter run."""
    words = hash_words(texts)
    grams = n_grams(words, n)
    short = np.flatnonzero((words.counts < n) & (words.counts > 0))
    if not len(short):
        return grams
    whole = np.zeros(len(short), np.uint64)
    for i in range(n - 1):
        there = words.counts[short] > i
        whole[there] = whole[there] * _NEXT + words.hashes[words.offsets[short[there]] + i]
    counts = grams.counts
    counts[short] = 1
    hashes = np.insert(grams.hashes, grams.offsets[short], mix(whole))
    return Grams.of(hashes, counts)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spreads every bit over all others (the finalizer of SplitMix64), a bijection of the 64-bit numbers."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def in_batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Slices of `texts` of about 64 kB, the size at which the arrays stay in the cache."""
    start, size = 0, 0
    for i, text in enumerate(texts):
        size += len(text) + 1
        if size >= _BATCH_BYTES:
            yield texts[start : i + 1]
            start, size = i + 1, 0
    if start < len(texts):
        yield texts[start:]


def in_blocks(grams: Grams) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.int64]]]:
    """Documents that have hashes, about 16,000 hashes at a time: which, their hashes, and where each begins in these.

    So many stay in the cache while they are gone through again and again.
    """
    filled = np.flatnonzero(grams.counts)
    starts = grams.offsets[:-1][filled]
    first = 0
    while first < len(starts):
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + _BLOCK)))
        stop = starts[last] if last < len(starts) else len(grams.hashes)
        yield filled[first:last], grams.hashes[starts[first] : stop], starts[first:last] - starts[first]
        first = last


def _table_size(length: int) -> int:
    return max(_BATCH_BYTES, 1 << (length - 1).bit_length())


@lru_cache(maxsize=2)
def _powers(length: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Powers of the multiplier and of its inverse, modulo 2^64."""
    tables = []
    for base in (_MULTIPLIER, _INVERSE):
        table = np.full(length, base, np.uint64)
        table[0] = 1
        tables.append(np.cumprod(table, dtype=np.uint64))
    return tables[0], tables[1]
