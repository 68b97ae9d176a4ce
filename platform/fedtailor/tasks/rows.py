"""Rows of tables: JSON Lines, JSON, CSV, TSV and Parquet files, each also gzipped, and data sets of the hub.

Every row comes with its place for messages: text files by line counts from 1, tables and lists by row count from 0, as
the hub's viewer does.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from fedtailor.core.errors import DataError, reported_as

_BLOCK = 1 << 16
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


class Row(NamedTuple):
    """One row and where it was found, e.g. ``data.jsonl, line 3``.

    Args:
        where: file or data set, and line or row.
        values: column to cell. A missing value is None, and a whole number that came as ``3.0``, as pandas writes those
            of a column that lacks some, is an int. Cells of CSV and TSV are texts as they stand, the empty one too.
    """

    where: str
    values: Mapping[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of one file, in its order; the ending of its name says how it is read.

    A JSON file holds a list of rows, or one row after another, each on a line of its own or indented over several. A
    ``.csv`` file may have ``;``, ``|`` or tabs between its columns.
    Texts are UTF-8, or UTF-16 with a byte order mark.

    Raises:
        DataError: unknown ending, or a damaged, truncated or empty file; names file and line or row.
    """
    if not is_table(path):
        raise DataError(f"{path}: the file's ending is not one of {', '.join(ENDINGS)} (each also with .gz)")
    empty = True
    for row in ENDINGS[_ending(path)](path):
        empty = False
        yield row
    if empty:
        raise DataError(f"{path}: holds no row")


def is_table(path: Path) -> bool:
    """Whether the ending of a file's name is one that `read_rows` knows."""
    return _ending(path) in ENDINGS


def separated_rows(path: Path, expected: Sequence[str] = ()) -> Iterator[Row]:
    """Rows of a CSV or TSV file with a header, possibly none; fields may be quoted and then hold line breaks.

    Args:
        path: the file; if its name ends in ``.csv``, its header tells the separator: ``,``, ``;``, ``|`` or a tab.
        expected: columns that the header must have.

    Raises:
        DataError: unreadable, damaged or truncated; names file and line (of a row, its first one).
    """
    text, kind = read_text(path), _ending(path)
    first = text.lstrip("\r\n").partition("\n")[0]
    # Spreadsheets of many countries write ';' into a .csv; the first of equals wins.
    separator = "\t" if kind == ".tsv" else max(",;\t|", key=first.count)
    # The default limit of 131,072 characters guards against unbalanced quotes; strict=True reports those.
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in lines:
            where, line = f"{path}, line {line}", lines.line_num + 1
            if not cells or (header is None and not any(map(str.strip, cells))):
                continue
            if header is None:
                header = _header(cells, where, expected)
            elif len(cells) == len(header):
                yield Row(where, dict(zip(header, cells, strict=True)))
            else:
                raise DataError(
                    f"{where}: {len(cells)} columns, expected {len(header)}; the file may be truncated, or a text that "
                    f"holds {separator!r} or a line break lacks its quotes"
                )
        if header is None:
            _header([], f"{path}, line 1", expected)
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line}: damaged or truncated {kind[1:].upper()}: {error}; a quote inside a quoted text is "
            'written ""'
        ) from error


def _header(cells: Sequence[str], where: str, expected: Sequence[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not set(expected) <= set(names):
        raise DataError(f"{where}: header is {names}, expected {list(expected)}")
    if twice := {name for name in names if name and names.count(name) > 1}:
        raise DataError(f"{where}: the column {min(twice)!r} occurs twice")
    return names


def list_rows(values: Any, where: str) -> Iterator[Row]:
    """The rows of a list of objects, each one's place being its number from 0.

    Raises:
        DataError: not a list, or something else in it.
    """
    if not isinstance(values, list):
        raise DataError(f"{where}: expected a list of rows, found {type(values).__name__}")
    for number, value in enumerate(values):
        yield plain_row(value, f"{where}, row {number}")


def plain_row(value: Any, where: str) -> Row:
    """A row with cells as `Row` describes them; raises DataError for what is no object with named fields."""
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: a row must be an object with named fields, found {type(value).__name__}")
    return Row(where, {str(name).strip(): _plain(cell) for name, cell in value.items()})


def _plain(cell: Any) -> Any:
    if not isinstance(cell, float):
        return cell
    return None if cell != cell else int(cell) if cell.is_integer() else cell


def _json(path: Path) -> Iterator[Row]:
    text = read_text(path)
    if text.lstrip().startswith("["):
        yield from list_rows(parse_json(text, str(path)), str(path))
        return
    end, line = 0, 1
    while (start := _not_blank(text, end)) < len(text):
        line += text.count("\n", end, start)
        where = f"{path}, line {line}"
        value, end = _value_at(text, start, where)
        yield plain_row(value, where)
        line += text.count("\n", start, end)


def _parquet(path: Path) -> Iterator[Row]:
    raw = read_bytes(path)
    with reported_as(DataError, f"{path}: cannot be read as Parquet", pa.ArrowException, OSError):
        values = (value for batch in pq.ParquetFile(pa.BufferReader(raw)).iter_batches() for value in batch.to_pylist())
        for number, value in enumerate(values):
            yield plain_row(value, f"{path}, row {number}")


ENDINGS: Final[Mapping[str, Callable[[Path], Iterator[Row]]]] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": separated_rows,
    ".tsv": separated_rows,
    ".parquet": _parquet,
}
"""Ending of a file's name to what reads it."""


def _ending(path: Path) -> str:
    """``.jsonl`` of ``a.jsonl`` and of ``a.jsonl.gz``."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def read_bytes(path: Path) -> bytes:
    """All bytes of a file, decompressed if its name ends in ``.gz``.

    Raises:
        DataError: unreadable, or truncated or damaged gzip; names the line of the decompressed text, from 1.
    """
    raw = bytearray()
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as stream:
            while block := stream.read1(_BLOCK):
                raw += block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        line = raw.count(b"\n") + 1
        raise DataError(f"{path}, line {line}: damaged or truncated gzip: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return bytes(raw)


def read_text(path: Path) -> str:
    """The whole text of a file: UTF-8 with or without a byte order mark, or UTF-16 with one; see `read_bytes`.

    Raises:
        DataError: see `read_bytes`, or it is neither; names file and line.
    """
    raw = read_bytes(path)
    encoding = next((name for mark, name in _BOMS if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        # With UTF-8's mark, the decoder counts from behind it.
        at = error.start + (len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)
        line, name = raw.count(b"\n", 0, at) + 1, encoding.removesuffix("-sig").upper()
        raise DataError(
            f"{path}, line {line}: not {name}: byte 0x{raw[at : at + 1].hex()} at position {at} (from 0): "
            f"{error.reason}; save the file as UTF-8"
        ) from error
    if "\0" in text:
        before = text.partition("\0")[0]
        raise DataError(
            f"{path}, line {before.count(chr(10)) + 1}: a zero byte at position {len(before.encode())} (from 0), so "
            "this is no UTF-8 text; UTF-16 is read where the file begins with its byte order mark; save it as UTF-8"
        )
    return text


def parse_json(text: str, where: str) -> Any:
    """Parses one JSON value; a key that an object has twice is an error, as one of the two values would be lost.

    Raises:
        DataError: damaged; says where.
    """
    value, end = _value_at(text, _not_blank(text, 0), where)
    if (rest := text[_not_blank(text, end) :]) != "":
        raise DataError(f"{where}: damaged JSON: {rest[:40]!r} follows the end of its value")
    return value


def _value_at(text: str, at: int, where: str) -> tuple[Any, int]:
    """The JSON value that begins at a character, and where it ends."""
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: damaged JSON: {error}") from error


def _not_blank(text: str, at: int) -> int:
    found = _NOT_BLANK.search(text, at)
    return found.start() if found else len(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return found


_DECODER, _NOT_BLANK = json.JSONDecoder(object_pairs_hook=_object), re.compile(r"\S")


def hub_rows(*name: str, split: str) -> Iterator[Row]:
    """Rows of one split of a data set on the Hugging Face hub, see `load_hub`."""
    for number, values in enumerate(load_hub(*name, split=split)):
        yield plain_row(values, f"{hub_name(*name, split=split)}, row {number}")


def load_hub(*name: str, split: str) -> Any:
    """One split of a data set on the Hugging Face hub, or in the local cache of it.

    Args:
        name: its id (``owner/name``) and, where it has several, the name of a configuration.
        split: name of the split.

    Raises:
        DataError: it cannot be loaded; says what to do without a connection.
    """
    from datasets import load_dataset  # half a second that only this path needs

    try:
        return load_dataset(*name, split=split)
    except Exception as error:  # the library lets OSError, ValueError, HTTP and its own errors through
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"cannot load {hub_name(*name, split=split)} from the hub: {type(error).__name__}: {reason}. Set task.path "
            "to a local file or folder, or FEDTAILOR_DATA to a folder of data sets, or load it once while connected"
        ) from error


def hub_name(*name: str, split: str) -> str:
    """``owner/name (configuration, split)``, for messages."""
    return f"{name[0]} ({', '.join([*name[1:], split])})"
