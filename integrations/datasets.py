"""Datasets by name, for the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_efficiency.selection.optional import require


def load_rows(name: str, split: str) -> Any:
    """A `datasets.Dataset` from a .parquet file, a folder written by `save_to_disk`, or the Hub.

    Raises:
        ValueError: it is not there or has no such split.
        ImportError: datasets is not installed.
    """
    datasets = require("datasets", f"reading {name!r}")
    path = Path(name)
    if path.is_file():
        return datasets.load_dataset("parquet", data_files=str(path), split="train")
    if path.is_dir():
        if not (path / "dataset_info.json").is_file() and not (path / "dataset_dict.json").is_file():
            raise ValueError(f"the folder {name!r} was not written by datasets' save_to_disk.")
        loaded: Any = datasets.load_from_disk(name)
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"{name!r} has the splits {list(loaded)}, none of them {split!r}.")
            loaded = loaded[split]
        return loaded
    try:
        return datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(f"{name!r} is no file here and no dataset that the Hub gives: {error}") from error
