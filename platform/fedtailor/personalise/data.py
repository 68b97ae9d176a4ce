"""A user's table as labelled texts: which columns, rows and classes; what is trained on and what is held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from fedtailor.core.errors import DataError, listed
from fedtailor.core.seeding import numpy_rng
from fedtailor.personalise.files import Table
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


@dataclass(frozen=True)
class Columns:
    """Names that the user gave; None: found by `TEXT_NAMES`, `PAIR_NAMES` and `LABEL_NAMES`."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Labelled:
    """Texts with a class each.

    Args:
        name: of the table that they come from.
        sha256: of that table.
        columns: the names that were used.
        texts: first or only texts.
        pairs: second texts; None where there are none.
        labels: class ids.
        rows: rows found in the table.
        empty: rows left out because a text was missing or blank.
    """

    name: str
    sha256: str
    columns: Columns
    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: tuple[int, ...]
    rows: int
    empty: int

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Iterable[int]) -> Labelled:
        """Some of the rows, in the order of ``index``."""
        chosen = list(index)
        return replace(
            self,
            texts=tuple(self.texts[i] for i in chosen),
            pairs=None if self.pairs is None else tuple(self.pairs[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
        )

    def counts(self, classes: int) -> list[int]:
        """Rows of each class."""
        return [int(n) for n in np.bincount(self.labels, minlength=classes)]

    def normalised(self) -> list[str]:
        """Each row's texts in the form in which two of them count as the same."""
        pairs = self.pairs or (None,) * len(self)
        return [Example(text, 0, pair).normal for text, pair in zip(self.texts, pairs, strict=True)]


def labelled(table: Table, wanted: Columns, allowed: Sequence[str]) -> Labelled:
    """Finds the columns, drops rows without text and reads the labels.

    A label is a class name (case and surrounding spaces do not matter) or its number.

    Args:
        table: as read.
        wanted: columns named by the user.
        allowed: class names of the base model in the order of their ids.

    Raises:
        DataError: a column is missing (names those present), a text is no text, a label is missing or unknown
            (names it, the row from 1 and the allowed ones), or nothing is left.
    """
    columns = _find(table, wanted)
    assert columns.text is not None
    assert columns.label is not None
    texts = _texts(table, columns.text)
    pairs = None if columns.pair is None else _texts(table, columns.pair)
    full = [i for i, text in enumerate(texts) if text.strip() and (pairs is None or pairs[i].strip())]
    if not full:
        raise DataError(f"{table.name}: all {len(table)} rows have an empty text (column '{columns.text}')")
    return Labelled(
        name=table.name,
        sha256=table.sha256,
        columns=columns,
        texts=tuple(texts[i] for i in full),
        pairs=None if pairs is None else tuple(pairs[i] for i in full),
        labels=_labels(table, columns.label, full, allowed),
        rows=len(table),
        empty=len(table) - len(full),
    )


def _find(table: Table, wanted: Columns) -> Columns:
    known = {name.casefold(): name for name in reversed(list(table.columns))}
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


def _texts(table: Table, name: str) -> list[str]:
    values = table.columns[name]
    for row, value in enumerate(values, start=1):
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"{table.name}, row {row}: column '{name}' holds {value!r:.60} ({type(value).__name__}), not a text"
            )
        if value is not None and not _is_unicode(value):
            raise DataError(f"{table.name}, row {row}: column '{name}' holds half a surrogate pair, which is no text")
    return [value or "" for value in values]


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _labels(table: Table, name: str, rows: Sequence[int], allowed: Sequence[str]) -> tuple[int, ...]:
    read = _reader(allowed, table.classes.get(name))
    values = table.columns[name]
    missing = [i + 1 for i in rows if _is_missing(values[i], name in table.classes)]
    if missing:
        raise DataError(
            f"{table.name}: {len(missing)} of {len(rows)} rows have no label in column '{name}' (row "
            f"{listed(missing)}); give each one of: {_allowed(allowed)}"
        )
    ids = {i: read(values[i]) for i in rows}
    strange: dict[str, int] = {}
    for i, label in ids.items():
        if label is None:
            strange.setdefault(f"{values[i]!r:.60}", i + 1)
    if strange:
        unknown = listed([f"{value} (row {row})" for value, row in strange.items()])
        raise DataError(
            f"{table.name}: column '{name}' has labels that the base model does not know: {unknown}; "
            f"allowed: {_allowed(allowed)}"
        )
    return tuple(label for label in ids.values() if label is not None)


def _reader(allowed: Sequence[str], classes: Sequence[str] | None) -> Callable[[Any], int | None]:
    """Label to class id, None where unknown. Names win over numbers, exact spelling over other cases."""
    names = {name.casefold(): i for i, name in reversed(list(enumerate(allowed)))}
    exact = {name: i for i, name in enumerate(allowed)}
    numbers = {str(i): i for i in range(len(allowed))}

    def read(value: Any) -> int | None:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            return None
        if classes is not None and isinstance(value, int):
            value = classes[value]
        word = str(value).strip()
        if word in exact:
            return exact[word]
        if word.casefold() in names:
            return names[word.casefold()]
        # Tables with a missing value elsewhere often turn whole numbers into 3.0.
        whole = word.removesuffix(".0")
        return numbers.get(whole)

    return read


def _is_missing(value: Any, from_classes: bool) -> bool:
    # -1 stands for "no label" in data sets of the Hugging Face library.
    return value is None or (isinstance(value, str) and not value.strip()) or (from_classes and value == -1)


def _allowed(names: Sequence[str]) -> str:
    return ", ".join(f"{name} ({i})" for i, name in enumerate(names))


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
    groups: dict[str, list[int]] = {}
    for i, key in enumerate(data.normalised()):
        groups.setdefault(key, []).append(i)
    draws = numpy_rng(seed, "newcomer", "held-out").random(len(groups))
    members = list(groups.values())
    order = sorted(range(len(members)), key=lambda g: (data.labels[members[g][0]], draws[g]))
    left, owed, out = data.counts(max(data.labels) + 1), 0.0, set[int]()
    for group in order:
        rows = members[group]
        owed += fraction * len(rows)
        used = {label: sum(data.labels[i] == label for i in rows) for label in {data.labels[i] for i in rows}}
        if owed >= len(rows) / 2 and all(left[label] > count for label, count in used.items()):
            out.update(rows)
            owed -= len(rows)
            for label, count in used.items():
                left[label] -= count
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


def shared_texts(train: Labelled, test: Labelled) -> int:
    """Held-out rows whose text is trained on too: their score flatters."""
    trained = set(train.normalised())
    return sum(key in trained for key in test.normalised())
