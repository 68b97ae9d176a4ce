"""Reads a user's own data: a table in a file, or a data set of the Hugging Face library."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from fedtailor.core.errors import DataError
from fedtailor.tasks.rows import Row, is_table, read_rows

SPLIT_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "train": ("train",),
    "test": ("test", "validation", "dev", "valid"),
}
"""Splits of a Hugging Face data set that may stand for each use, in order of preference."""

Use = Literal["train", "test"]

_HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class Table:
    """Rows as they were found.

    Args:
        name: file name or data set id, for messages and the record.
        rows: cells by column, None where a value is missing; classes of a data set (`datasets.ClassLabel`) by name.
        sha256: hex hash of the file's bytes; of the rows as JSON for a Hugging Face data set.
    """

    name: str
    rows: Sequence[Row]
    sha256: str

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in the order in which they first appear."""
        return list(dict.fromkeys(name for row in self.rows for name in row.values))


def read_table(source: str, use: Use = "train") -> Table:
    """Reads a file, a folder of the ``datasets`` library, or a data set of the hub.

    Args:
        source: a file that `tasks.rows.read_rows` reads; a folder that ``datasets`` can load; or a hub id,
            ``owner/name`` or ``owner/name:config``.
        use: which split is meant where there are several.

    Raises:
        DataError: nothing there, without rows, or damaged (names the place).
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows = list(read_rows(path))
        with path.open("rb") as stream:
            return Table(path.name, rows, hashlib.file_digest(stream, "sha256").hexdigest())
    named = _HUB.fullmatch(source)
    if not path.is_dir() and (path.exists() or is_table(path) or named is None):
        raise DataError(f"{source}: no such file (a hub data set is named owner/name or owner/name:config)")
    return _dataset(source, path, named, use)


def _dataset(source: str, path: Path, named: re.Match[str] | None, use: Use) -> Table:
    import datasets  # a second that only this path needs

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(path))
        elif path.is_dir() or named is None:
            found = datasets.load_dataset(str(path))
        else:
            found = datasets.load_dataset(named["id"], named["config"])
    except Exception as error:  # the library lets OSError, ValueError, HTTP and its own errors through
        kind = "folder" if path.is_dir() else "file nor folder here, nor a hub data set that can be reached"
        raise DataError(f"{source}: not a data set {kind}: {type(error).__name__}: {error}") from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    split = _split(source, found, use)
    columns = {name: [_plain(value) for value in split[name]] for name in split.column_names}
    if not len(split):
        raise DataError(f"{source}: has no rows (columns: {', '.join(columns) or 'none'})")
    text = json.dumps(columns, sort_keys=True, ensure_ascii=True, default=str)
    for column, feature in split.features.items():
        if isinstance(feature, datasets.ClassLabel):  # -1 is no class
            classes = dict(enumerate(feature.names))
            columns[column] = [classes.get(value) for value in columns[column]]
    cells = zip(*columns.values(), strict=True)
    rows = [Row(f"{source}, row {n}", dict(zip(columns, row, strict=True))) for n, row in enumerate(cells)]
    return Table(path.name if path.is_dir() else source, rows, hashlib.sha256(text.encode()).hexdigest())


def _plain(cell: Any) -> Any:
    return None if isinstance(cell, float) and cell != cell else cell


def _split(source: str, found: Any, use: Use) -> Any:
    if hasattr(found, "column_names") and isinstance(found.column_names, list):
        return found
    have = list(found)
    for name in (*SPLIT_NAMES[use], *(have if len(have) == 1 else ())):
        if name in have:
            return found[name]
    raise DataError(f"{source}: no split to {use} with: it has {have}, looked for {list(SPLIT_NAMES[use])}")
