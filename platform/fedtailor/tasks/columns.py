"""Which column of a user's own table holds what, and what its cells mean: texts, labels, names of clients."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from fedtailor.core.errors import DataError, did_you_mean, listed
from fedtailor.tasks.config import AUTO, TaskConfig
from fedtailor.tasks.partition import id_part
from fedtailor.tasks.rows import Row

TEXT_NAMES: Final = (
    "text", "sentence", "premise", "sentence1", "text1", "question1", "content", "headline", "title", "review", "body",
)  # fmt: skip
"""Columns that are taken for the text, in order of preference, whatever their case."""

PAIR_NAMES: Final[Mapping[str, str]] = {
    "premise": "hypothesis",
    "sentence1": "sentence2",
    "text1": "text2",
    "question1": "question2",
    "text": "text_pair",
}
"""Text column to the column of the second text that goes with it."""

LABEL_NAMES: Final = ("label", "labels", "category", "class", "target", "topic")
"""Columns that are taken for the label."""

CLIENT_NAMES: Final = ("client", "client_id", "user", "user_id", "annotator", "annotator_id", "author", "author_id")
"""Columns that are taken for the client."""

ONE_GROUP = "all"
"""The group (language) of every example where the data name none."""

_WHOLE = re.compile(r"([+-]?\d+)\.0+")
_PARTIAL = re.compile(r"[+-]?\d*\.\d+")
_LONGEST_NUMBER = 20
_SURROGATE = re.compile("[\ud800-\udfff]")


class Columns(NamedTuple):
    """Names of the columns of a labelled table; None: it has none of this kind."""

    text: str
    label: str
    pair: str | None = None
    client: str | None = None
    group: str | None = None


def find_column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of these names that a table has: as spelled, else whatever its case."""
    any_case = {column.casefold(): column for column in reversed(columns)}
    found = (name if name in columns else any_case.get(name.casefold()) for name in names)
    return next(filter(None, found), None)


def labelled_columns(columns: Sequence[str], cfg: TaskConfig, where: str, keys: str = "task.{}_column") -> Columns:
    """The columns that the configuration names, or has found by their usual names.

    Args:
        columns: those there are.
        cfg: ``text_column`` and alike are used.
        where: name of the table, for messages.
        keys: what names a column, for messages; its kind takes the braces' place.

    Raises:
        DataError: every column that is missing, with the key that names it and the columns there are; or one column
            that would be two things.
    """
    problems: list[str] = []

    def chosen(key: str, names: Sequence[str], needed: bool = False) -> str | None:
        given = getattr(cfg, f"{key}_column")
        if given is None and not needed:
            return None
        automatic = given in (AUTO, None)
        found = find_column(columns, names) if automatic else given if given in columns else None
        if found is None and not automatic:
            problems.append(f"no column {given!r} ({keys.format(key)}){did_you_mean(str(given), columns)}")
        elif found is None and needed:
            problems.append(f"no {key} column: none of {', '.join(names)}; name it with {keys.format(key)}")
        return found

    text = chosen("text", TEXT_NAMES, needed=True)
    partner = PAIR_NAMES.get((text or "").casefold())
    pair = chosen("pair", [partner] if partner else [])
    label = chosen("label", LABEL_NAMES, needed=True)
    client, group = chosen("client", CLIENT_NAMES), chosen("group", [])
    if problems:
        raise DataError(f"{where}: {'; '.join(problems)}. Columns there: {', '.join(columns)}")
    used = [column for column in (text, pair, label, client) if column]
    if twice := [column for column in used if used.count(column) > 1]:
        none = " (null: none)" if keys.startswith("task") else ""
        raise DataError(
            f"{where}: the column {twice[0]!r} would be two of text ({text}), pair ({pair}), label ({label}) and "
            f"client ({client}); name them with {keys.format('text')} and alike{none}"
        )
    return Columns(str(text), str(label), pair, client, group)


def text_cell(row: Row, column: str) -> str:
    """A text; empty where the value is missing.

    Raises:
        DataError: another type, or half a surrogate pair; says where.
    """
    value = row.values.get(column)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{row.where}: column {column!r} holds {value!r:.60} ({type(value).__name__}), not a text")
    if value and _SURROGATE.search(value):
        raise DataError(f"{row.where}: column {column!r} holds half a surrogate pair, which is no text")
    return value or ""


def label_cell(row: Row, column: str) -> str:
    """The name of a class; empty where the value is missing. A whole number is the same class as ``3`` and ``3.0``.

    Raises:
        DataError: a number with a fraction, or a list; says where.
    """
    value = row.values.get(column)
    if value is None:
        return ""
    word = str(value).strip()
    if not isinstance(value, (str, int)) or (_PARTIAL.fullmatch(word) and not _WHOLE.fullmatch(word)):
        raise DataError(
            f"{row.where}: the label {value!r:.60} (column {column!r}, task.label_column) is no class: a label is a "
            "name or a whole number"
        )
    return _whole(word)


def in_order(labels: set[str]) -> list[str]:
    """Class names in an order that depends on nothing else: whole numbers by size, then names by their letters.

    >>> in_order({"10", "9", "no"})
    ['9', '10', 'no']
    """
    return sorted(labels, key=lambda label: (0, int(label), label) if _is_whole(label) else (1, 0, label))


def name_cell(row: Row, column: str, key: str) -> str:
    """A client or a group, as a part of a client's id.

    Args:
        row: where it is.
        column: its column.
        key: configuration key that named the column, for messages.

    Raises:
        DataError: no such column, nothing in it, neither a name nor a whole number, or half a surrogate pair; says
            where.
    """
    if column not in row.values:
        raise DataError(f"{row.where}: no column {column!r} ({key}); columns: {', '.join(map(str, row.values))}")
    value = row.values[column]
    if not isinstance(value, (str, int)) or isinstance(value, bool) or not str(value).strip():
        raise DataError(f"{row.where}: {column!r} ({key}) is {value!r}; it must be a name or a whole number")
    if _SURROGATE.search(str(value)):
        raise DataError(
            f"{row.where}: {column!r} ({key}) is {value!r}, with half a surrogate pair, which no file name can hold; "
            "name the client anew"
        )
    return id_part(_whole(str(value).strip()))


def refuse_missing_labels(where: Sequence[str], rows: int, column: str) -> None:
    """Refuses rows with a text and without a label: what they are is not to be guessed.

    Args:
        where: places of rows without a label.
        rows: how many rows have a text.
        column: of the labels.

    Raises:
        DataError: there is such a row; names the first places.
    """
    if where:
        raise DataError(
            f"no label in {len(where)} of the {rows} rows with a text (column {column!r}, task.label_column): "
            f"{listed(where, 3, '; ')}. Label them or leave them out of the file"
        )


def _whole(word: str) -> str:
    """``3`` for ``3.0``, as tables write whole numbers beside missing ones; other words as they are."""
    found = _WHOLE.fullmatch(word)
    return found[1] if found else word


def _is_whole(word: str) -> bool:
    return word.removeprefix("-").isdecimal() and word.isascii() and len(word) < _LONGEST_NUMBER
