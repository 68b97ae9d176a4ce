"""Arrow stream files: written in blocks of equal length, read through a memory map.

The files are what `datasets` itself writes, so `datasets.Dataset.from_file(path)` opens them too.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from fedtailor.core.errors import DataError

BLOCK = 4096
"""Rows of a record batch (the last one may be shorter); row i lies in batch i // BLOCK at i % BLOCK."""


def write_stream(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Writes record batches one after another; holds one batch in memory."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def open_stream(path: Path, rows: int) -> list[pa.RecordBatch]:
    """Memory-maps a file written by `write_stream`; no column is read before it is used.

    Raises:
        DataError: the file is missing, damaged, or does not hold `rows` rows; names it.
    """
    try:
        with pa.ipc.open_stream(pa.memory_map(str(path), "r")) as reader:
            batches = list(reader)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: missing or damaged data file: {error}") from error
    # A stream that was cut between two batches reads as a shorter one.
    found = sum(batch.num_rows for batch in batches)
    if found != rows:
        raise DataError(f"{path}: damaged data file: {found} rows, its manifest says {rows}")
    return batches
