"""Task ``instructions``: instruction tuning on any table whose rows name their client.

``task.path`` is a file (JSON Lines, JSON, CSV, TSV, Parquet, also gzipped), a folder of such files, or the
id of a data set on the Hugging Face hub (``task.split`` of it). `instruction_rows` says which fields a row may have.
Beside them a row has the client (``task.client_column``), optionally a group (``task.group_column``) and optionally
``split``: ``train`` or ``test``. In a folder, files named ``train.*`` and ``test.*`` say the split of their rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.instruction_rows import Dropped, Turn, read_turn
from fedtailor.tasks.partition import LabelledSplit, id_part, natural_clients
from fedtailor.tasks.rows import Row, hub_rows, is_table, read_rows, table_files
from fedtailor.tasks.source import SPLITS, Example, Source, Split, TaskEntry

ONE_GROUP = "all"
"""The group of every example where no column names one."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class _Entry(NamedTuple):
    """A row that was understood."""

    where: str
    client: str
    group: str
    split: Split | None
    turn: Turn


def load(cfg: TaskConfig, seed: int) -> Source:
    """The clients that the rows name, in the order in which they first appear.

    Rows without a response or an instruction are dropped and counted. Without a split of its own, every client is
    split by ``task.test_fraction``. A slash in a name is written ``%2F``, as slashes part a client's id.

    Args:
        cfg: `path`, `split`, `client_column`, `group_column`, `unseen`, `test_fraction`, `max_examples` and
            `drop_duplicates` are used.
        seed: run seed.

    Raises:
        ConfigError: no ``task.path``, or one that is neither there nor a hub id.
        DataError: a damaged file, a row without client or of no known shape (names file, line and keys), a client with
            too few examples, an unseen client that does not exist, or the hub cannot be reached.
    """
    entries = _split_known([_entry(row, cfg) for row in _rows(cfg)])
    dropped = Dropped()
    kept = [entry for entry in entries if dropped.keeps(entry.turn)]
    groups = sorted({entry.group for entry in kept})
    index = {group: i for i, group in enumerate(groups)}
    clients: dict[str, list[LabelledSplit]] = {entry.client: [] for entry in entries}
    for e in kept:
        example = Example(e.turn.text, index[e.group], e.turn.response, e.turn.history)
        clients[e.client].append(LabelledSplit(example, e.split))
    notes: dict[str, int | str] = {"rows_read": len(entries), **dropped.notes}
    notes["split"] = "of the data" if entries[0].split else f"{cfg.test_fraction:g} of every client for test"
    found = natural_clients(clients, groups, cfg, seed)
    return Source(labels=tuple(groups), notes=notes, kind="generation", natural_clients=tuple(found))


def _rows(cfg: TaskConfig) -> Iterator[Row]:
    if cfg.path is None:
        raise ConfigError(
            "task=instructions needs 'task.path': a file or folder (.jsonl, .json, .csv, .tsv, .parquet), "
            "or the id of a data set on the Hugging Face hub (owner/name)"
        )
    place = Path(cfg.path).expanduser()
    if place.is_file():
        return read_rows(place)
    if place.is_dir():
        return _folder_rows(table_files(place))
    like_a_path = cfg.path.startswith((".", "/", "~")) or cfg.path.count("/") > 1 or is_table(place)
    if like_a_path or not _HUB_ID.fullmatch(cfg.path):
        raise ConfigError(f"'task.path' is {cfg.path!r}: no such file or folder, nor an id on the hub (owner/name)")
    return hub_rows(cfg.path, split=cfg.split)


def _folder_rows(files: Sequence[Path]) -> Iterator[Row]:
    for path in files:
        stem = path.name.split(".")[0]
        named = {"split": stem} if stem in SPLITS else {}
        for row in read_rows(path):
            yield Row(row.where, {**named, **row.values})


def _entry(row: Row, cfg: TaskConfig) -> _Entry:
    client = _name(row, cfg.client_column, "task.client_column")
    group = _name(row, cfg.group_column, "task.group_column") if cfg.group_column else ONE_GROUP
    return _Entry(row.where, client, group, _split(row), read_turn(row))


def _name(row: Row, column: str, key: str) -> str:
    if column not in row.values:
        columns = ", ".join(map(str, row.values))
        raise DataError(f"{row.where}: no column {column!r} ({key}); columns: {columns}")
    value = row.values[column]
    if not isinstance(value, (str, int)) or isinstance(value, bool) or not str(value).strip():
        raise DataError(f"{row.where}: {column!r} ({key}) is {value!r}; it must be a name or a whole number")
    return id_part(str(value).strip())


def _split(row: Row) -> Split | None:
    value = row.values.get("split")
    if value is None:
        return None
    if value not in SPLITS:
        raise DataError(f"{row.where}: 'split' is {value!r}; allowed: {', '.join(SPLITS)}")
    return cast(Split, value)


def _split_known(entries: list[_Entry]) -> list[_Entry]:
    """Either all rows say their split or none; a column that says ``train`` in every row says nothing."""
    said = {entry.split for entry in entries}
    if said == {"train"}:
        return [entry._replace(split=None) for entry in entries]
    if None in said and len(said) > 1:
        entry = next(entry for entry in entries if entry.split is None)
        raise DataError(f"{entry.where}: no 'split', but other rows have one; it is needed in all rows or none")
    return entries


ENTRY = TaskEntry(load, "generation", clients="natural", defaults={"max_length": 1024, "test_fraction": 0.2})
