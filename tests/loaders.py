"""Which loader reads which format is kept in transformers' tables, and `prefer()` changes them for a whole process."""

from contextlib import contextmanager

from transformers.quantizers import auto


@contextmanager
def tables_kept():
    """Puts transformers' tables back as they were: what is preferred inside ends with the block."""
    tables = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)
