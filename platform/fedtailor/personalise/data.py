"""A user's own data as labelled texts: a table in a file or of the Hugging Face library, its columns, its classes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from fedtailor.core.errors import DataError, listed
from fedtailor.tasks.rows import Row, is_table, read_rows
from fedtailor.tasks.source import Example

SPLIT_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "train": ("train",),
    "test": ("test", "validation", "dev", "valid"),
}
"""Splits of a Hugging Face data set that may stand for each use, in order of preference."""

Use = Literal["train", "test"]
_HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")
TEXT_NAMES: Final = ("text", "sentence", "premise", "sentence1", "text1", "content", "headline", "title")
"""Columns that are taken for the text, in order of preference, whatever their case."""

PAIR_NAMES: Final[Mapping[str, str]] = {
    "premise": "hypothesis",
    "sentence1": "sentence2",
    "text1": "text2",
    "text": "text_pair",
}
"""Text column to the column of the second text that goes with it."""

LABEL_NAMES: Final = ("label", "labels", "category", "class", "target")
"""Columns that are taken for the label."""

_SURROGATE = re.compile("[\ud800-\udfff]")


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


@dataclass(frozen=True)
class Columns:
    """Names that the user gave; None: found by `TEXT_NAMES`, `PAIR_NAMES` and `LABEL_NAMES`."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Labelled:
    """Texts, or pairs of texts, with a class each.

    Args:
        name: of the table that they come from.
        sha256: of that table.
        columns: the names that were used.
        examples: the rows that have a text.
        rows: rows found in the table.
        empty: rows left out because a text was missing or blank.
    """

    name: str
    sha256: str
    columns: Columns
    examples: tuple[Example, ...]
    rows: int
    empty: int

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def labels(self) -> list[int]:
        """Class id of each row."""
        return [row.label for row in self.examples]

    def take(self, index: Iterable[int]) -> Labelled:
        """Some of the rows, in the order of ``index``."""
        return replace(self, examples=tuple(self.examples[i] for i in index))

    def counts(self, classes: int) -> list[int]:
        """Rows of each class."""
        return [int(n) for n in np.bincount(self.labels, minlength=classes)]

    def described(self, classes: Sequence[str], truncated: int) -> dict[str, Any]:
        """What a record says of the rows.

        Args:
            classes: class names in the order of their ids.
            truncated: rows whose text was cut.
        """
        return {
            "name": self.name,
            "sha256": self.sha256,
            "columns": asdict(self.columns),
            "rows": self.rows,
            "empty": self.empty,
            "used": len(self),
            "truncated": truncated,
            "classes": dict(zip(classes, self.counts(len(classes)), strict=True)),
        }


def labelled(table: Table, wanted: Columns, allowed: Sequence[str]) -> Labelled:
    """Finds the columns, drops rows without text and reads the labels.

    A label is a class name (case and surrounding spaces do not matter) or its number.

    Args:
        table: as read.
        wanted: columns named by the user.
        allowed: class names of the base model in the order of their ids.

    Raises:
        DataError: a column is missing (names those present), a text is no text, a label is missing or unknown
            (names it, its place and the allowed ones), or nothing is left.
    """
    columns = _find(table, wanted)
    found = [(row, _text(row, columns.text) or "", _text(row, columns.pair)) for row in table.rows]
    full = [(row, text, pair) for row, text, pair in found if text.strip() and (pair is None or pair.strip())]
    if not full:
        raise DataError(f"{table.name}: all {len(found)} rows have an empty text (column '{columns.text}')")
    labels = _labels(table.name, str(columns.label), [row for row, _, _ in full], allowed)
    examples = tuple(Example(text, label, pair) for (_, text, pair), label in zip(full, labels, strict=True))
    return Labelled(table.name, table.sha256, columns, examples, len(found), len(found) - len(full))


def _find(table: Table, wanted: Columns) -> Columns:
    known = {name.casefold(): name for name in reversed(table.columns)}
    problems: list[str] = []

    def column(what: str, given: str | None, guesses: Sequence[str]) -> str | None:
        name = next((known[g.casefold()] for g in ([given] if given else guesses) if g.casefold() in known), None)
        if name is None and (given or what != "pair"):
            looked = f"'{given}'" if given else f"one of {', '.join(guesses)}"
            problems.append(f"no {what} column: looked for {looked} (name it with --{what})")
        return name

    text = column("text", wanted.text, TEXT_NAMES)
    partner = PAIR_NAMES.get((text or "").casefold())
    pair = column("pair", wanted.pair, [partner] if partner else [])
    label = column("label", wanted.label, LABEL_NAMES)
    if problems:
        raise DataError(f"{table.name}: {'; '.join(problems)}. Columns there: {', '.join(table.columns)}")
    if len({text, pair, label}) < 3:
        raise DataError(f"{table.name}: text ({text}), pair ({pair}) and label ({label}) must be different columns")
    return Columns(text, pair, label)


def _text(row: Row, column: str | None) -> str | None:
    """A text cell, empty where the value is missing; None without a column."""
    if column is None:
        return None
    value = row.values.get(column)
    if value is not None and not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"{row.where}: column '{column}' holds {value!r:.60} ({kind}), not a text")
    if value and _SURROGATE.search(value):
        raise DataError(f"{row.where}: column '{column}' holds half a surrogate pair, which is no text")
    return value or ""


def _labels(table: str, column: str, rows: Sequence[Row], allowed: Sequence[str]) -> list[int]:
    """Class ids. Names win over numbers, exact spelling over other cases, the first of equals."""
    exact = {name: i for i, name in enumerate(allowed)}
    any_case = {name.casefold(): i for i, name in reversed(list(enumerate(allowed)))}
    numbers = {str(i): i for i in range(len(allowed))}
    known = ", ".join(f"{name} ({i})" for i, name in enumerate(allowed))
    missing, unknown, ids = list[str](), dict[str, str](), list[int]()
    for row in rows:
        value, place = row.values.get(column), row.where.rpartition(", ")[2]
        word = "" if value is None else str(value).strip()
        # Tables with a missing value elsewhere often turn whole numbers into 3.0.
        found = exact.get(word, any_case.get(word.casefold(), numbers.get(word.removesuffix(".0"))))
        if found is not None:
            ids.append(found)
        elif word:
            unknown.setdefault(f"{value!r:.60}", place)
        else:
            missing.append(place)
    if missing:
        raise DataError(
            f"{table}: {len(missing)} of {len(rows)} rows have no label in column '{column}' ({listed(missing)}); "
            f"give each one of: {known}"
        )
    if unknown:
        strange = listed([f"{value} ({place})" for value, place in unknown.items()])
        raise DataError(
            f"{table}: column '{column}' has labels that the base model does not know: {strange}; allowed: {known}"
        )
    return ids
