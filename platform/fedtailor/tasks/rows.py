"""Rows of a table from files (JSON Lines, JSON, CSV, Parquet; text files also gzipped) or from the hub.

Every row comes with its place for messages: files by line counts from 1, tables and lists by row count from 0, as the
hub's viewer does.
"""

from __future__ import annotations

import csv
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from fedtailor.core.errors import DataError

_BLOCK = 1 << 16


def local_folder(path: str | None, name: str) -> Path | None:
    """The folder of data set `name`: `path` (``task.path``), else $FEDTAILOR_DATA/name, else None (use the hub).

    Raises:
        DataError: the folder does not exist; says which of the two named it.
    """
    if path is not None:
        folder, origin = Path(path), "task.path"
    elif os.environ.get("FEDTAILOR_DATA"):
        folder, origin = Path(os.environ["FEDTAILOR_DATA"]) / name, "FEDTAILOR_DATA"
    else:
        return None
    if not folder.is_dir():
        raise DataError(f"{origin}: {folder} is not a folder; it should hold one folder per language")
    return folder


def read_text(path: Path) -> str:
    """The whole text of a UTF-8 file, decompressed if its name ends in ``.gz``.

    Raises:
        DataError: unreadable, truncated or damaged gzip, or not UTF-8; names file and line (of the
            decompressed text, from 1).
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = _gunzip(path, raw)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8: {error.reason} 0x{raw[error.start]:02x}") from error


def _gunzip(path: Path, raw: bytes) -> bytes:
    text = bytearray()
    try:
        while raw:
            stream = zlib.decompressobj(wbits=31)  # 31: gzip header and checksum
            for at in range(0, len(raw), _BLOCK):
                text += stream.decompress(raw[at : at + _BLOCK])
                if stream.eof:
                    raw = stream.unused_data + raw[at + _BLOCK :]
                    break
            else:
                raise EOFError("the stream has no end")
    except (EOFError, zlib.error) as error:
        line = text.count(b"\n") + 1
        raise DataError(f"{path}, line {line}: damaged or truncated gzip: {error}") from error
    return bytes(text)


class Row(NamedTuple):
    """One row and where it was found, e.g. ``data.jsonl, line 3``."""

    where: str
    values: Mapping[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of one file, in its order; the ending of its name says how it is read.

    A ``.json`` file holds a list of rows, or one row per line.

    Raises:
        DataError: unknown ending, or a damaged, truncated or empty file; names file and line or row.
    """
    reader = _READERS.get(_kind(path))
    if reader is None:
        raise DataError(f"{path}: the file's ending is not one of {', '.join(_READERS)} (text files also with .gz)")
    empty = True
    for row in reader(path):
        empty = False
        yield row
    if empty:
        raise DataError(f"{path}: holds no row")


def table_files(folder: Path) -> list[Path]:
    """The files of a folder that `read_rows` can read, by name.

    Raises:
        DataError: there is none.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and is_table(path))
    if not files:
        raise DataError(f"{folder}: holds no file that ends in {', '.join(_READERS)} (text files also with .gz)")
    return files


def is_table(path: Path) -> bool:
    """Whether the ending of a file's name is one that `read_rows` knows."""
    return _kind(path) in _READERS


def find_file(path: str | None, dataset: str, names: Sequence[str]) -> Path | None:
    """The file of a data set: `path` (``task.path``, a file or its folder), else $FEDTAILOR_DATA/dataset, else None.

    Args:
        path: ``task.path``.
        dataset: name of the folder in $FEDTAILOR_DATA.
        names: names the file may have, each also with ``.gz``.

    Raises:
        DataError: neither a file nor a folder with it; says which key or variable named it, and what was expected.
    """
    if path is not None:
        place, origin = Path(path).expanduser(), "task.path"
    elif os.environ.get("FEDTAILOR_DATA"):
        place, origin = Path(os.environ["FEDTAILOR_DATA"]) / dataset, "FEDTAILOR_DATA"
    else:
        return None
    if place.is_file():
        return place
    found = [place / f"{name}{ending}" for name in names for ending in ("", ".gz")]
    for file in found:
        if file.is_file():
            return file
    what = f"the folder {place} holds none of" if place.is_dir() else f"{place} does not exist; it should hold one of"
    raise DataError(f"{origin}: {what} {', '.join(file.name for file in found)}")


def parse_json(text: str, where: str) -> Any:
    """Parses one JSON value; a key that an object has twice is an error, as one of the two values would be lost.

    Raises:
        DataError: damaged; says where.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (json.JSONDecodeError, _Repeated, RecursionError) as error:
        raise DataError(f"{where}: damaged JSON: {error}") from error


def hub_rows(name: str, split: str) -> Iterator[Row]:
    """Rows of one split of a data set on the Hugging Face hub, or in the local cache of it.

    Raises:
        DataError: it cannot be loaded; says what to do without a connection.
    """
    from datasets import load_dataset  # half a second that only this path needs

    try:
        found = load_dataset(name, split=split)
    except Exception as error:  # the library lets OSError, ValueError, HTTP and its own errors through
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"cannot load the data set '{name}' (split '{split}') from the hub: {type(error).__name__}: {reason}. "
            "Set task.path to a local file or folder, or load it once while connected"
        ) from error
    for number, values in enumerate(found):
        yield Row(f"{name} ({split}), row {number}", values)


class _Repeated(ValueError):
    """A key occurs twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise _Repeated(f"the key {twice!r} occurs twice in one object")
    return found


def _kind(path: Path) -> str:
    """``.jsonl`` of ``a.jsonl`` and of ``a.jsonl.gz``."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a row must be an object with named fields, this is of type {type(value).__name__}")
    return Row(where, value)


def _lines(path: Path) -> Iterator[Row]:
    # Not splitlines(): a text may hold U+2028 and the like, which JSON does not escape.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _row(parse_json(line, where), where)


def _json(path: Path) -> Iterator[Row]:
    text = read_text(path).lstrip("\ufeff \t\r\n")
    if not text.startswith("["):
        yield from _lines(path)
        return
    for number, value in enumerate(parse_json(text, str(path))):
        yield _row(value, f"{path}, row {number}")


def _csv(path: Path) -> Iterator[Row]:
    # The default limit of 131,072 characters guards against unbalanced quotes; strict=True reports those.
    csv.field_size_limit(2**31 - 1)
    text = io.StringIO(read_text(path).removeprefix("\ufeff"), newline="")
    rows = csv.DictReader(text, delimiter="\t" if _kind(path) == ".tsv" else ",", strict=True)
    line = 1
    try:
        columns = len(rows.fieldnames or ())
        line = rows.line_num + 1
        for values in rows:
            if None in values or None in values.values():
                raise DataError(f"{path}, line {line}: not {columns} columns as in the header; it may be truncated")
            yield Row(f"{path}, line {line}", values)
            line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: damaged or truncated CSV: {error}") from error


def _parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    yield Row(f"{path}, row {number}", values)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


_READERS: Final[Mapping[str, Callable[[Path], Iterator[Row]]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
