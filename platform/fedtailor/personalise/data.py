"""A user's table as labelled texts: which columns, rows and classes; what is trained on and what is held out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from fedtailor.core.errors import DataError, listed
from fedtailor.core.seeding import numpy_rng
from fedtailor.personalise.files import Table
from fedtailor.tasks.rows import Row
from fedtailor.tasks.source import Example

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


def limited(data: Labelled, limit: int, seed: int) -> Labelled:
    """At most ``limit`` rows: a seeded draw, in the order of the file."""
    if len(data) <= limit:
        return data
    return data.take(sorted(numpy_rng(seed, "newcomer", "limit").permutation(len(data))[:limit]))


def hold_out(data: Labelled, fraction: float, seed: int) -> tuple[Labelled, Labelled]:
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


def refuse_single_class(data: Labelled, allowed: Sequence[str]) -> None:
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


def refuse_mixture(train: Labelled, test: Labelled) -> None:
    """Both sides have single texts, or both have pairs.

    Raises:
        DataError: one of each; names both.
    """
    if (train.columns.pair is None) != (test.columns.pair is None):
        with_pairs, without = (train, test) if test.columns.pair is None else (test, train)
        raise DataError(
            f"{with_pairs.name} has pairs of texts ({with_pairs.columns.text}, {with_pairs.columns.pair}), "
            f"{without.name} has single texts; name both columns with --text and --pair"
        )


def shared_texts(train: Labelled, test: Labelled) -> int:
    """Held-out rows whose text is trained on too: their score flatters."""
    trained = {row.normal for row in train.examples}
    return sum(row.normal in trained for row in test.examples)
