"""Reads a user's own data into columns: CSV, TSV, JSON lines, Parquet, or a data set of the Hugging Face library."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import pandas as pd

from fedtailor.core.errors import DataError

SUFFIXES: Final = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
"""Endings of files that are read."""

SPLIT_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "train": ("train",),
    "test": ("test", "validation", "dev", "valid"),
}
"""Splits of a Hugging Face data set that may stand for each use, in order of preference."""

Use = Literal["train", "test"]

_HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")

_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True)
class Table:
    """Rows as they were found.

    Args:
        name: file name or data set id, for messages and the record.
        columns: name to values, all of one length; None where a value is missing.
        sha256: hex hash of the file's bytes; of the rows as JSON for a Hugging Face data set.
    """

    name: str
    columns: Mapping[str, list[Any]]
    sha256: str

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


def read_table(source: str, use: Use = "train") -> Table:
    """Reads a file, a folder of the ``datasets`` library, or a data set of the hub.

    Args:
        source: a path that ends in one of `SUFFIXES`; a folder that ``datasets`` can load; or a hub id,
            ``owner/name`` or ``owner/name:config``.
        use: which split is meant where there are several.

    Raises:
        DataError: nothing there, empty, not UTF-8 (names the byte) or damaged.
    """
    path = Path(source).expanduser()
    if path.is_file():
        table = _file(path)
    elif path.is_dir() or (not path.exists() and path.suffix.lower() not in SUFFIXES and _HUB.fullmatch(source)):
        table = _dataset(source, path, use)
    else:
        raise DataError(f"{source}: no such file (a hub data set is named owner/name or owner/name:config)")
    if not len(table):
        raise DataError(f"{source}: has no rows (columns: {', '.join(table.columns) or 'none'})")
    return table


def _file(path: Path) -> Table:
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise DataError(f"{path}: cannot tell what kind of file this is; endings that are read: {', '.join(SUFFIXES)}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not raw.strip():
        raise DataError(f"{path}: the file is empty")
    if kind == ".parquet":
        columns = _parquet(path, raw)
    elif kind in (".csv", ".tsv"):
        columns = _separated(path, _decoded(path, raw), "\t" if kind == ".tsv" else None)
    else:
        columns = _json(path, _decoded(path, raw))
    return Table(path.name, columns, hashlib.sha256(raw).hexdigest())


def _decoded(path: Path, raw: bytes) -> str:
    """UTF-8 with or without a byte order mark, or UTF-16 with one."""
    encoding = next((name for mark, name in _BOMS if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        # With a mark, the decoder counts from behind it.
        at = error.start + (len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)
        found, line = raw[at : at + 1].hex(), raw.count(b"\n", 0, at) + 1
        raise DataError(
            f"{path}: not {encoding.removesuffix('-sig').upper()}: byte 0x{found} at position {at} (from 0; line "
            f"{line}): {error.reason}; save the file as UTF-8"
        ) from error
    if "\0" in text:
        at = len(text.partition("\0")[0].encode())
        raise DataError(
            f"{path}: a zero byte at position {at} (from 0), so this is no UTF-8 text; UTF-16 is read where the "
            "file begins with its byte order mark; save the file as UTF-8"
        )
    return text


def _separated(path: Path, text: str, separator: str | None) -> dict[str, list[Any]]:
    header = text.lstrip("\r\n").split("\n", 1)[0]
    # Spreadsheets of many countries write ';' into a .csv; the first of equals wins.
    separator = separator or max(",;\t", key=header.count)
    try:
        with warnings.catch_warnings():
            # Without this, a row longer than the header would shift or lose fields.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                io.StringIO(text), sep=separator, dtype=str, na_filter=False, keep_default_na=False, index_col=False
            )
    except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError) as error:
        reason = " ".join(str(error).split()).replace("Error tokenizing data. C error: ", "")
        if isinstance(error, pd.errors.ParserWarning):
            reason = "the first row has more fields than the header"
        raise DataError(
            f'{path}: damaged table: {reason}; a text that holds {separator!r} or a line break stands in "quotes", '
            'and a quote inside is written ""'
        ) from error
    return _columns(frame)


def _json(path: Path, text: str) -> dict[str, list[Any]]:
    where = ""
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = []
            for number, line in enumerate(text.split("\n"), start=1):
                where = f", line {number}"
                if line.strip():
                    rows.append(json.loads(line))
    except ValueError as error:
        raise DataError(f"{path}{where}: not JSON: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, row {number}: a {type(row).__name__}, where an object with named fields is needed"
            )
    names = dict.fromkeys(name for row in rows for name in row)
    return {str(name).strip(): [_plain(row.get(name)) for row in rows] for name in names}


def _parquet(path: Path, raw: bytes) -> dict[str, list[Any]]:
    try:
        frame = pd.read_parquet(io.BytesIO(raw))
    except (ValueError, OSError) as error:  # pyarrow's own errors are both
        raise DataError(f"{path}: not a Parquet file, or damaged: {str(error).splitlines()[0]}") from error
    return _columns(frame)


def _columns(frame: pd.DataFrame) -> dict[str, list[Any]]:
    return {str(name).strip(): [_plain(value) for value in frame[name].tolist()] for name in frame.columns}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and value != value else value


def _dataset(source: str, path: Path, use: Use) -> Table:
    import datasets  # a second that only this path needs

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(path))
        elif path.is_dir():
            found = datasets.load_dataset(str(path))
        else:
            named = _HUB.fullmatch(source)
            assert named is not None
            found = datasets.load_dataset(named["id"], named["config"])
    except Exception as error:  # the library lets OSError, ValueError, HTTP and its own errors through
        kind = "folder" if path.is_dir() else "file nor folder here, nor a hub data set that can be reached"
        raise DataError(f"{source}: not a data set {kind}: {type(error).__name__}: {error}") from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    rows = _split(source, found, use)
    columns = {name: [_plain(value) for value in rows[name]] for name in rows.column_names}
    text = json.dumps(columns, sort_keys=True, ensure_ascii=True, default=str)
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.ClassLabel):  # its integers mean names; -1 means none
            named = dict(enumerate(feature.names))
            columns[column] = [named.get(value) for value in columns[column]]
    name = path.name if path.is_dir() else source
    return Table(name, columns, hashlib.sha256(text.encode()).hexdigest())


def _split(source: str, found: Any, use: Use) -> Any:
    if hasattr(found, "column_names") and isinstance(found.column_names, list):
        return found
    have = list(found)
    for name in (*SPLIT_NAMES[use], *(have if len(have) == 1 else ())):
        if name in have:
            return found[name]
    raise DataError(f"{source}: no split to {use} with: it has {have}, looked for {list(SPLIT_NAMES[use])}")
