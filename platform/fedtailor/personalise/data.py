"""A client's own rows, out of any table that a task's data can be: its columns, its classes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedtailor.core.errors import DataError, listed
from fedtailor.tasks.columns import LABEL_NAMES, PAIR_NAMES, TEXT_NAMES, find_column, text_cell
from fedtailor.tasks.config import AUTO, TaskConfig
from fedtailor.tasks.instructions import is_complete, none_dropped, read_example
from fedtailor.tasks.rows import Row
from fedtailor.tasks.source import Example, Split
from fedtailor.tasks.tables import own_table


@dataclass(frozen=True)
class Table:
    """Rows as they were found.

    Args:
        name: file name or data set id, for messages and the record.
        rows: see `tasks.rows.Row`.
        sha256: hex hash of the file's bytes; of the rows as JSON for a folder or data set.
    """

    name: str
    rows: Sequence[Row]
    sha256: str


def read_tables(source: str, option: str, split: Split, split_column: str | None = AUTO) -> tuple[Table, Table | None]:
    """Rows to learn from, and those that the data say are for test; None: they say nothing of it.

    Args:
        source: file, folder or hub id, as ``task.path`` is.
        option: what named it, for messages.
        split: of a data set from the hub.
        split_column: says ``train`` or ``test`` of each row; ``auto``: ``split``, where there is one; None: none does.

    Raises:
        ConfigError: nothing there.
        DataError: without rows, or damaged (names the place); see `own_table`.
    """
    told = TaskConfig(name="texts", path=source, split=split, split_column=split_column)
    found, path = own_table(told, option), Path(source).expanduser()
    if path.is_file():
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    else:
        text = json.dumps([dict(row.values) for row in found.rows], sort_keys=True, default=str)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
    name, placed = path.name if path.exists() else source, list(zip(found.rows, found.splits, strict=True))
    train, test = ([row for row, split in placed if (split == "test") is held] for held in (False, True))
    return Table(name, train, sha256), Table(name, test, sha256) if test else None


@dataclass(frozen=True)
class Columns:
    """Names that the user gave; None: found by the usual ones of `tasks.columns`."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None

    def or_of(self, task: TaskConfig) -> Columns:
        """Where the user named none, the columns that the run was told."""
        told = (task.text_column, task.pair_column, task.label_column)
        own = Columns(*(None if name == AUTO else name for name in told))
        return Columns(self.text or own.text, self.pair or own.pair, self.label or own.label)


@dataclass(frozen=True)
class Rows:
    """A client's rows: texts, or pairs of texts, with a class each; or instructions with a response each.

    Args:
        name: of the table that they come from.
        sha256: of that table.
        columns: the names that were used; None where instructions are read, which have usual names.
        examples: the rows that can be used.
        rows: rows found in the table.
        empty: rows left out because a text, an instruction or a response was missing or blank.
    """

    name: str
    sha256: str
    columns: Columns | None
    examples: tuple[Example, ...]
    rows: int
    empty: int

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def labels(self) -> list[int]:
        """Class id of each row."""
        return [row.label for row in self.examples]

    def take(self, index: Iterable[int]) -> Rows:
        """Some of the rows, in the order of ``index``."""
        return replace(self, examples=tuple(self.examples[i] for i in index))

    def described(self, classes: Sequence[str]) -> dict[str, Any]:
        """What a record says of the rows.

        Args:
            classes: class names in the order of their ids; none of instructions.
        """
        found = {"name": self.name, "sha256": self.sha256, "rows": self.rows, "empty": self.empty, "used": len(self)}
        if self.columns is None:
            return found
        counts = np.bincount(self.labels, minlength=len(classes)).tolist()
        return found | {"columns": asdict(self.columns), "classes": dict(zip(classes, counts, strict=True))}


def instructed(table: Table) -> Rows:
    """Reads instructions with their responses, in any shape of the task ``instructions``; incomplete rows are dropped.

    Raises:
        DataError: a row of another shape (names its place and keys), or nothing is left.
    """
    dropped = none_dropped()
    examples = tuple(e for e in map(read_example, table.rows) if is_complete(e, dropped))
    if not examples:
        raise DataError(f"{table.name}: all {len(table.rows)} rows have an empty instruction or response")
    return Rows(table.name, table.sha256, None, examples, len(table.rows), dropped.total())


def labelled(table: Table, wanted: Columns, allowed: Sequence[str]) -> Rows:
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
    names = [name for name in (columns.text, columns.pair) if name]
    found = [(row, [text_cell(row, name) for name in names]) for row in table.rows]
    full = [(row, texts) for row, texts in found if all(map(str.strip, texts))]
    if not full:
        raise DataError(f"{table.name}: all {len(found)} rows have an empty text (column '{columns.text}')")
    labels = _labels(table.name, str(columns.label), [row for row, _ in full], allowed)
    examples = tuple(Example(texts[0], label, *texts[1:]) for (_, texts), label in zip(full, labels, strict=True))
    return Rows(table.name, table.sha256, columns, examples, len(found), len(found) - len(full))


def _find(table: Table, wanted: Columns) -> Columns:
    columns = list(dict.fromkeys(name for row in table.rows for name in row.values))
    problems: list[str] = []

    def column(what: str, given: str | None, guesses: Sequence[str]) -> str | None:
        name = find_column(columns, [given] if given else guesses)
        if name is None and (given or what != "pair"):
            looked = f"'{given}'" if given else f"one of {', '.join(guesses)}"
            problems.append(f"no {what} column: looked for {looked} (name it with --{what})")
        return name

    text = column("text", wanted.text, TEXT_NAMES)
    partner = PAIR_NAMES.get((text or "").casefold())
    pair = column("pair", wanted.pair, [partner] if partner else [])
    label = column("label", wanted.label, LABEL_NAMES)
    if problems:
        raise DataError(f"{table.name}: {'; '.join(problems)}. Columns there: {', '.join(columns)}")
    if len({text, pair, label}) < 3:
        raise DataError(f"{table.name}: text ({text}), pair ({pair}) and label ({label}) must be different columns")
    return Columns(text, pair, label)


def _labels(table: str, column: str, rows: Sequence[Row], allowed: Sequence[str]) -> list[int]:
    """Class ids. Names win over numbers, exact spelling over other cases, the first of equals."""
    exact = {name: i for i, name in enumerate(allowed)}
    any_case = {name.casefold(): i for i, name in reversed(list(enumerate(allowed)))}
    numbers = {str(i): i for i in range(len(allowed))}
    known = ", ".join(f"{name} ({i})" for i, name in enumerate(allowed))
    missing, unknown, ids = list[str](), dict[str, str](), list[int]()
    for row in rows:
        value, place = row.values.get(column), row.where.rpartition("/")[2]
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
