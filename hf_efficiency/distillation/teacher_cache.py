"""What a teacher said, on disk: training reads it and holds no teacher.

A cache is a folder of Arrow files, which are mapped into memory and read where they lie, and a manifest. Each row is a
sequence: its token ids, and for each token but the last the k most likely next tokens, their log-probabilities
(float16) and the log of the mass of all others. A row is found by the checksum of its token ids, so batches may come in
any order, padded in any way.

Shape legend: b batch, t tokens of a sequence, k tokens kept, n rows (tokens with a label).
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_efficiency.distillation.targets import TopK

MANIFEST = "teacher_cache.json"
VERSION = 1


def arrow() -> Any:
    """The module pyarrow.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import_module("pyarrow.ipc")
        return import_module("pyarrow")
    except ImportError as error:
        raise ImportError("A teacher cache needs pyarrow: pip install 'hf_efficiency[data]'.") from error


def sequence_key(ids: Sequence[int] | Tensor) -> bytes:
    """Checksum of a sequence of token ids, of 16 bytes."""
    values = ids.cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    return hashlib.blake2b(values.astype("<i8").tobytes(), digest_size=16).digest()


def data_checksum(sequences: Iterable[Sequence[int] | Tensor]) -> str:
    """Checksum of sequences in their order."""
    total = hashlib.blake2b(digest_size=16)
    for ids in sequences:
        total.update(sequence_key(ids))
    return total.hexdigest()


def tokenizer_checksum(tokenizer: Any) -> str:
    """Checksum of a tokenizer's vocabulary, of the text of each id."""
    entries = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.blake2b(json.dumps(entries).encode(), digest_size=16).hexdigest()


def model_checksum(model: Any) -> str:
    """Checksum of a model's weights, their names and types; of weights offloaded to disk the shape only."""
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


class TeacherCache:
    """A finished cache, open for reading.

    Attributes:
        manifest: What it was made from: checksums of `teacher`, `tokenizer` and `data`, `top_k`, `temperature`,
            `vocab_size`, `sequences`, `tokens`.

    Args:
        folder: Where `cache_teacher` or `hf-efficiency cache-teacher` wrote it.

    Raises:
        ValueError: There is no cache in the folder, it is of another version, or not finished.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if not self.manifest["complete"]:
            raise ValueError(
                f"The teacher cache {str(folder)!r} is not finished: run cache-teacher with the same arguments again, "
                "and it goes on."
            )
        pa = arrow()
        self._tables = []
        self._places: dict[bytes, tuple[int, int]] = {}
        for i, name in enumerate(self.manifest["shards"]):
            with pa.memory_map(str(self.folder / name)) as source:
                table = pa.ipc.open_file(source).read_all().combine_chunks()
            columns = {column: table.column(column).chunk(0) for column in table.column_names}
            self._tables.append(columns)
            self._places |= {key: (i, row) for row, key in enumerate(columns["key"].to_pylist())}

    @property
    def temperature(self) -> float:
        """At which the probabilities were taken."""
        return float(self.manifest["temperature"])

    @property
    def vocab_size(self) -> int:
        """Columns of the teacher's logits."""
        return int(self.manifest["vocab_size"])

    def __len__(self) -> int:
        return int(self.manifest["sequences"])

    def __contains__(self, ids: Sequence[int] | Tensor) -> bool:
        return sequence_key(ids) in self._places

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Compares the checksum of `tokenizer` with that of the cache, where it has one.

        Raises:
            ValueError: They differ.
        """
        known = self.manifest["tokenizer"]
        ours = tokenizer_checksum(tokenizer)
        if known is not None and ours != known:
            raise ValueError(
                f"The teacher cache {str(self.folder)!r} was made with another tokenizer (its checksum is {known}, "
                f"that of this {type(tokenizer).__name__} is {ours}): make the cache again with this one."
            )

    def check_data(self, sequences: Iterable[Sequence[int] | Tensor], name: str = "the data") -> None:
        """Makes sure that the cache holds each of the sequences.

        Raises:
            ValueError: It does not.
        """
        for ids in sequences:
            if ids not in self:
                raise ValueError(
                    f"A sequence of {name} ({len(ids)} tokens) is not in the teacher cache {str(self.folder)!r}, which "
                    f"was made from other data or cut otherwise (checksum {self.manifest['data']}): train on "
                    "TeacherCache(...).dataset(), or make the cache again from all that is trained and evaluated on."
                )

    def rows(self, ids: Tensor) -> TopK:
        """What the teacher said after each token of a sequence (t,) but the last: t - 1 rows.

        Raises:
            ValueError: The cache does not hold the sequence.
        """
        place = self._places.get(sequence_key(ids))
        if place is None:
            self.check_data([ids])
        shard, row = place  # type: ignore[misc]  # check_data raised
        columns, k = self._tables[shard], int(self.manifest["top_k"])
        top = _values(columns["top_ids"], row).astype(np.int64).reshape(-1, k)
        log_p = _values(columns["log_p"], row).astype(np.float32).reshape(-1, k)
        rest = _values(columns["log_rest"], row).astype(np.float32)
        return TopK(*(torch.from_numpy(values) for values in (top, log_p, rest)))

    def lookup(self, input_ids: Tensor, attention_mask: Tensor, valid: Tensor) -> TopK:
        """The rows (n,) of a batch that `valid` asks for, on the device of the batch.

        Args:
            input_ids: (b, t).
            attention_mask: (b, t), 0 at padding on either side.
            valid: (b, t - 1) bool, whether the loss of the next token is wanted.

        Raises:
            ValueError: The cache does not hold a sequence.
        """
        found = []
        for ids, mask, wanted in zip(input_ids.cpu(), attention_mask.cpu().bool(), valid.cpu(), strict=True):
            rows = self.rows(ids[mask])
            first = int(mask.int().argmax())
            at = wanted.nonzero()[:, 0] - first
            found.append((rows.ids[at], rows.log_p[at], rows.log_rest[at]))
        return TopK(*(torch.cat(parts).to(input_ids.device) for parts in zip(*found, strict=True)))

    def dataset(self) -> "CachedSequences":
        """The sequences of the cache, to train on: rows of `input_ids` and `labels`."""
        return CachedSequences(self)

    def sequence(self, index: int) -> list[int]:
        """The token ids of a row, counted as they were written."""
        for columns in self._tables:
            if index < len(columns["key"]):
                return list(_values(columns["input_ids"], index).tolist())
            index -= len(columns["key"])
        raise IndexError(f"The cache has {len(self)} sequences.")


class CachedSequences(Dataset[dict[str, list[int]]]):
    """The token ids of a cache as a dataset."""

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = self.cache.sequence(range(len(self))[index])
        return {"input_ids": ids, "labels": ids}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache, finished or not.

    Raises:
        ValueError: There is none, or it is of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} holds no teacher cache ({MANIFEST} is missing).")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"The teacher cache {str(folder)!r} is of version {manifest.get('version')}, this code reads {VERSION}."
        )
    return manifest


def _values(column: Any, row: int) -> Any:
    """One list of a list column, as numpy without a copy."""
    start, end = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    return column.values.slice(start, end - start).to_numpy(zero_copy_only=True)
