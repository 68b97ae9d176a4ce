"""Task ``instructions``: instruction tuning on any table whose rows name their client.

``task.path`` is a file (JSON Lines, JSON, CSV, TSV, Parquet, also gzipped), a folder of such files, or the
id of a data set on the Hugging Face hub (``task.split`` of it). A row has the client (``task.client_column``),
optionally a group (``task.group_column``) and optionally ``split``: ``train`` or ``test``. In a folder, files named
``train.*`` and ``test.*`` say the split of their rows. Beside these, a row has one of three shapes (the names are those
of the common data sets):

* ``messages``: a list of ``{"role": ..., "content": ...}``; the last assistant message is the response, what follows it
  is left out;
* ``prompt`` and ``completion``: two texts, or two lists of messages;
* ``instruction``, optionally ``input`` or ``context``, and ``response`` or ``output``. Input or context belong to the
  instruction: after it, with an empty line between.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.partition import LabelledSplit, id_part, natural_clients
from fedtailor.tasks.rows import Row, hub_rows, is_table, parse_json, read_rows, table_files
from fedtailor.tasks.source import SPLITS, Example, Source, Split, TaskEntry

ONE_GROUP = "all"
"""The group of every example where no column names one."""

ROLES: tuple[str, ...] = ("system", "user", "assistant")

SHAPES = (
    "'messages' (a list of role and content); 'prompt' and 'completion'; "
    "'instruction' (with 'input' or 'context') and 'response' or 'output'"
)

_CONTEXTS, _RESPONSES = ("input", "context"), ("response", "output")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class _Entry(NamedTuple):
    """A row that was understood."""

    where: str
    client: str
    group: str
    split: Split | None
    example: Example


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
    entries = [_entry(row, cfg) for row in _rows(cfg)]
    splits = {entry.split for entry in entries}
    if None in splits and len(splits) > 1:
        where = next(entry.where for entry in entries if entry.split is None)
        raise DataError(f"{where}: no 'split', but other rows have one; it is needed in all rows or none")
    own_split = not splits <= {None, "train"}  # a column that says ``train`` in every row says nothing
    dropped = none_dropped()
    kept = [entry for entry in entries if is_complete(entry.example, dropped)]
    groups = sorted({entry.group for entry in kept})
    labels = {group: label for label, group in enumerate(groups)}
    clients: dict[str, list[LabelledSplit]] = {entry.client: [] for entry in entries}
    for e in kept:
        example = e.example._replace(label=labels[e.group])
        clients[e.client].append(LabelledSplit(example, e.split if own_split else None))
    notes: dict[str, int | str] = {"rows_read": len(entries), **dropped}
    notes["split"] = "of the data" if own_split else f"{cfg.test_fraction:g} of every client for test"
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
        yield from read_rows(place)
    elif place.is_dir():
        for path in table_files(place):
            stem = path.name.split(".")[0]
            named = {"split": stem} if stem in SPLITS else {}
            yield from (Row(row.where, {**named, **row.values}) for row in read_rows(path))
    elif cfg.path.startswith((".", "/", "~")) or is_table(place) or not _HUB_ID.fullmatch(cfg.path):
        raise ConfigError(f"'task.path' is {cfg.path!r}: no such file or folder, nor an id on the hub (owner/name)")
    else:
        yield from hub_rows(cfg.path, split=cfg.split)


def _entry(row: Row, cfg: TaskConfig) -> _Entry:
    client = _name(row, cfg.client_column, "task.client_column")
    group = _name(row, cfg.group_column, "task.group_column") if cfg.group_column else ONE_GROUP
    split = row.values.get("split")
    if split is not None and split not in SPLITS:
        raise DataError(f"{row.where}: 'split' is {split!r}; allowed: {', '.join(SPLITS)}")
    return _Entry(row.where, client, group, cast(Split | None, split), read_example(row))


def _name(row: Row, column: str, key: str) -> str:
    if column not in row.values:
        columns = ", ".join(map(str, row.values))
        raise DataError(f"{row.where}: no column {column!r} ({key}); columns: {columns}")
    value = row.values[column]
    if not isinstance(value, (str, int)) or isinstance(value, bool) or not str(value).strip():
        raise DataError(f"{row.where}: {column!r} ({key}) is {value!r}; it must be a name or a whole number")
    return id_part(str(value).strip())


# ---- the shapes of rows --------------------------------------------------------------------------------------------


def none_dropped() -> Counter[str]:
    """Counts for `is_complete`, as notes of a task."""
    return Counter({"dropped_empty_responses": 0, "dropped_empty_instructions": 0})


def is_complete(example: Example, dropped: Counter[str]) -> bool:
    """Whether an example has an instruction and a response, without which nothing can be learnt; counts what is not."""
    if not (example.pair or "").strip():
        dropped["dropped_empty_responses"] += 1
    elif not example.text.strip():
        dropped["dropped_empty_instructions"] += 1
    else:
        return True
    return False


def read_example(row: Row, label: int = 0) -> Example:
    """The example of a row of any of the three shapes; a field that is null counts as absent where another shape fits.

    Instruction and response may be blank, see `is_complete`.

    Raises:
        DataError: none of the shapes (names the keys found), or a field of another type; says where.
    """
    where, values = row
    filled = {key: value for key, value in values.items() if value is not None}
    for fields in (filled, values):
        if fields.get("messages") is not None:
            return _conversation(fields["messages"], where, label)
        if {"prompt", "completion"} <= fields.keys():
            prompt, completion = fields["prompt"], fields["completion"]
            if isinstance(prompt, list) and isinstance(completion, list):
                return _conversation([*prompt, *completion], where, label)
            return Example(_text(fields, "prompt", where), label, _text(fields, "completion", where))
        response = next((key for key in _RESPONSES if key in fields), None)
        if response and "instruction" in fields:
            parts = [_text(fields, key, where) for key in ("instruction", *_CONTEXTS) if key in fields]
            text = "\n\n".join([parts[0], *(part for part in parts[1:] if part.strip())])
            return Example(text, label, _text(fields, response, where))
    raise DataError(f"{where}: keys {', '.join(map(str, values))} fit none of the shapes: {SHAPES}")


def _text(fields: Mapping[str, Any], key: str, where: str) -> str:
    value = fields[key]
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be a text, this is of type {type(value).__name__}")
    return value or ""


def _conversation(messages: Any, where: str, label: int) -> Example:
    if isinstance(messages, str):  # as tables without nested columns keep them
        messages = parse_json(messages, f"{where}, 'messages'")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' must be a list of at least a user and an assistant message")
    turns = [_message(message, f"{where}, message {number}") for number, message in enumerate(messages)]
    ends = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not ends:
        raise DataError(f"{where}: 'messages' holds no assistant message, so there is no response")
    *history, asked = turns[: ends[-1]] or [{"role": "none"}]
    if asked["role"] != "user":
        raise DataError(f"{where}: 'messages' must have a user message right before the last assistant message")
    if any(turn["role"] == "system" for turn in history[1:]):
        raise DataError(f"{where}: a system message can only be the first of 'messages'")
    before = json.dumps(history, ensure_ascii=False) if history else None
    return Example(asked["content"], label, turns[ends[-1]]["content"], before)


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise DataError(f"{where}: a message has a 'role' and a 'content', this is {str(message)[:80]!r}")
    if message["role"] not in ROLES:
        raise DataError(f"{where}: unknown role {message['role']!r}; allowed: {', '.join(ROLES)}")
    return {"role": message["role"], "content": _text(message, "content", where)}


ENTRY = TaskEntry(load, "generation", clients="natural", defaults={"max_length": 1024, "test_fraction": 0.2})
