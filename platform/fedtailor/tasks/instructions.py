"""Task ``instructions``: instruction tuning on any table whose rows name their client.

``task.path`` is a file (JSON Lines, JSON, CSV, TSV, Parquet, also gzipped), a folder of such files, or the
id of a data set on the Hugging Face hub (``task.split`` of it). A row has the client (``task.client_column``),
optionally a group (``task.group_column``) and optionally its split, which in a folder the files' names may say
(`tasks.tables`). Beside these, a row has one of three shapes (the names are those of the common data sets):

* ``messages``: a list of ``{"role": ..., "content": ...}``; the last assistant message is the response, what follows it
  is left out;
* ``prompt`` and ``completion``: two texts, or two lists of messages;
* ``instruction``, optionally ``input`` or ``context``, and ``response`` or ``output``. Input or context belong to the
  instruction: after it, with an empty line between.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedtailor.core.errors import DataError
from fedtailor.tasks.columns import CLIENT_NAMES, ONE_GROUP, find_column, name_cell
from fedtailor.tasks.config import AUTO, TaskConfig
from fedtailor.tasks.partition import GroupOf, LabelledSplit, natural_clients
from fedtailor.tasks.rows import Row, parse_json
from fedtailor.tasks.source import Example, Source, TaskEntry
from fedtailor.tasks.tables import own_table

ROLES: tuple[str, ...] = ("system", "user", "assistant")

SHAPES = (
    "'messages' (a list of role and content); 'prompt' and 'completion'; "
    "'instruction' (with 'input' or 'context') and 'response' or 'output'"
)

_CONTEXTS, _RESPONSES = ("input", "context"), ("response", "output")


def load(cfg: TaskConfig, seed: int) -> Source:
    """The clients that the rows name, in the order in which they first appear.

    Rows without a response or an instruction are dropped and counted. Without a split of its own, every client is
    split by ``task.test_fraction``. A slash in a name is written ``%2F``, as slashes part a client's id.

    Args:
        cfg: `path`, `split`, `split_column`, `client_column`, `group_column`, `unseen`, `test_fraction`, `max_examples`
            and `drop_duplicates` are used.
        seed: run seed.

    Raises:
        ConfigError: no ``task.path``, or one that is neither there nor a hub id.
        DataError: a damaged file, a row without client or of no known shape (names file, line and keys), a client with
            too few examples, an unseen client that does not exist, or the hub cannot be reached.
    """
    table = own_table(cfg)
    automatic = find_column(table.columns, CLIENT_NAMES) if cfg.client_column == AUTO else cfg.client_column
    columns = {"client": automatic or CLIENT_NAMES[0]}  # rows without it are refused as they are read
    if cfg.group_column is not None:
        columns["group"] = cfg.group_column
    named = [
        {what: name_cell(row, column, f"task.{what}_column") for what, column in columns.items()} for row in table.rows
    ]
    examples = list(map(read_example, table.rows))
    of_group = [names.get("group", ONE_GROUP) for names in named]
    dropped = none_dropped()
    groups = sorted({group for group, e in zip(of_group, examples, strict=True) if is_complete(e, Counter())})
    labels = {group: label for label, group in enumerate(groups)}
    clients: dict[str, list[LabelledSplit]] = {names["client"]: [] for names in named}
    for names, group, example, split in zip(named, of_group, examples, table.splits, strict=True):
        if is_complete(example, dropped):
            clients[names["client"]].append(LabelledSplit(example._replace(label=labels[group]), split))
    found = natural_clients(clients, predominant(groups), cfg, seed)
    notes = {**table.notes, **dropped}
    return Source(tuple(groups), notes=notes, kind="generation", natural_clients=tuple(found), columns=columns)


def predominant(groups: Sequence[str]) -> GroupOf:
    """The group that most examples have, where `Example.label` is an index into the groups; the first of equals."""

    def group_of(_: str, examples: Sequence[Example]) -> str:
        return groups[max(range(len(groups)), key=[e.label for e in examples].count)]

    return group_of


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


def place_of(cfg: TaskConfig, example: Example) -> str:
    """File and row of the first example like this one."""
    rows = (row for row in own_table(cfg).rows if read_example(row, example.label) == example)
    return next((row.where for row in rows), "")


ENTRY = TaskEntry(
    load, "generation", clients="natural", defaults={"max_length": 1024, "test_fraction": 0.2}, place_of=place_of
)
