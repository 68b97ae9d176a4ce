"""A client's own rows, from any table that a task's data can be: columns, classes, what is held out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedtailor.core.errors import ConfigError, DataError, listed
from fedtailor.core.seeding import numpy_rng
from fedtailor.tasks.columns import Columns, labelled_columns, text_cell
from fedtailor.tasks.config import AUTO, TaskConfig
from fedtailor.tasks.instructions import is_complete, none_dropped, read_example
from fedtailor.tasks.rows import Row
from fedtailor.tasks.source import Example, Split
from fedtailor.tasks.tables import own_table

TEST_FRACTION = 0.2
"""Share of the data that is held out where neither they nor the user say which."""


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
        columns = {name: getattr(self.columns, name) for name in ("text", "pair", "label")}
        return found | {"columns": columns, "classes": dict(zip(classes, counts, strict=True))}


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


def labelled(table: Table, wanted: TaskConfig, allowed: Sequence[str]) -> Rows:
    """Finds the columns, drops rows without text and reads the labels.

    A label is a class name (case and surrounding spaces do not matter) or its number.

    Args:
        table: as read.
        wanted: names of the columns; where it names none, the usual ones are looked for.
        allowed: class names of the base model in the order of their ids.

    Raises:
        DataError: a column is missing (names those present), a text is no text, a label is missing or unknown
            (names it, its place and the allowed ones), or nothing is left.
    """
    there = list(dict.fromkeys(name for row in table.rows for name in row.values))
    columns = labelled_columns(there, wanted, table.name, "--{}")
    names = [name for name in (columns.text, columns.pair) if name]
    found = [(row, [text_cell(row, name) for name in names]) for row in table.rows]
    full = [(row, texts) for row, texts in found if all(map(str.strip, texts))]
    if not full:
        raise DataError(f"{table.name}: all {len(found)} rows have an empty text (column '{columns.text}')")
    labels = _labels(table.name, columns.label, [row for row, _ in full], allowed)
    pairs = [(texts[0], texts[1] if len(texts) > 1 else None) for _, texts in full]
    examples = tuple(Example(text, label, pair) for (text, pair), label in zip(pairs, labels, strict=True))
    return Rows(table.name, table.sha256, columns, examples, len(found), len(found) - len(full))


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


def read_data(
    data: str,
    test: str | None,
    wanted: TaskConfig,
    classes: Sequence[str],
    fraction: float | None,
    limit: int | None,
    seed: int,
) -> tuple[Rows, Rows, str]:
    """Rows to learn from, rows to score on, and where these come from.

    Args:
        data: file, folder or hub id, see `read_tables`.
        test: the same, to score on; None: what ``data`` says is for test, else a share of it.
        wanted: names of the columns, see `labelled`.
        classes: class names of the base model in the order of their ids; none: it answers.
        fraction: that share; None: `TEST_FRACTION`.
        limit: most rows to learn from and hold out of ``data``; None: all.
        seed: run seed.

    Raises:
        ConfigError: a share of data that say themselves what is for test.
        DataError: see `read_tables`, `labelled`, `instructed` and `hold_out`; one class alone; single texts to learn
            from and pairs to score on, or the other way round.
    """

    def made(table: Table) -> Rows:
        return labelled(table, wanted, classes) if classes else instructed(table)

    table, held = read_tables(data, "--data", "train", wanted.split_column)
    if held is not None and fraction is not None:
        raise ConfigError(
            f"--test-fraction {fraction:g}: {table.name} says itself which rows are for test; leave it out"
        )
    train = made(table)
    if limit is not None:
        train = limited(train, limit, seed)
    if classes:
        refuse_single_class(train, classes)
    if test is not None:
        rest, own = read_tables(test, "--test", "test", wanted.split_column)
        held_out, how = made(own or rest), "given"
    elif held is not None:
        held_out, how = made(held), "by the data"
    else:
        return *hold_out(train, TEST_FRACTION if fraction is None else fraction, seed), "held out of the data"
    columns, others = train.columns, held_out.columns
    if columns and others and (columns.pair is None) != (others.pair is None):
        paired, pairs, single = (train, columns, held_out) if others.pair is None else (held_out, others, train)
        raise DataError(
            f"{paired.name} has pairs of texts ({pairs.text}, {pairs.pair}), {single.name} has single texts; name both "
            "columns with --text and --pair"
        )
    return train, held_out, how


def limited(data: Rows, limit: int, seed: int) -> Rows:
    """At most ``limit`` rows: a seeded draw, in the order of the file."""
    if len(data) <= limit:
        return data
    return data.take(sorted(numpy_rng(seed, "newcomer", "limit").permutation(len(data))[:limit]))


def hold_out(data: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Splits into train and held-out rows, each class in proportion; no class loses its last train row.

    Rows with the same text stay on one side.

    Args:
        data: all rows.
        fraction: share to hold out, between 0 and 1.
        seed: run seed.

    Raises:
        DataError: so few rows that none can be held out.
    """
    groups, labels = dict[str, list[int]](), data.labels
    for i, row in enumerate(data.examples):
        groups.setdefault(row.normal, []).append(i)
    draws = numpy_rng(seed, "newcomer", "held-out").random(len(groups))
    drawn = sorted(zip(groups.values(), draws, strict=True), key=lambda group: (labels[group[0][0]], group[1]))
    left, owed, out = Counter(labels), 0.0, set[int]()
    for rows, _ in drawn:
        owed += fraction * len(rows)
        used = Counter(labels[i] for i in rows)
        if owed >= len(rows) / 2 and all(left[label] > count for label, count in used.items()):
            out.update(rows)
            owed -= len(rows)
            left -= used
    if not out:
        raise DataError(
            f"{data.name}: {len(data)} usable rows are too few to hold out {fraction:g} of them; give more rows, a "
            "larger --test-fraction, or a file of held-out rows with --test"
        )
    return data.take(i for i in range(len(data)) if i not in out), data.take(sorted(out))


def refuse_single_class(data: Rows, allowed: Sequence[str]) -> None:
    """Nothing can be learned from one class.

    Raises:
        DataError: fewer than two classes; names the one there is.
    """
    present = sorted(set(data.labels))
    if len(present) < 2:
        raise DataError(
            f"{data.name}: all {len(data)} usable rows are of one class ({allowed[present[0]]}); "
            "personalising needs at least two classes"
        )


def shared_texts(train: Rows, test: Rows) -> int:
    """Held-out rows whose text is trained on too: their score flatters."""
    trained = {row.normal for row in train.examples}
    return sum(row.normal in trained for row in test.examples)
