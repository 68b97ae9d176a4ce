"""Task ``texts``: your own texts, or pairs of texts, with a class each.

``task.path`` is a file (CSV, TSV, JSON Lines, JSON, Parquet, also gzipped), a folder of such files or of splits, or the
id of a data set on the Hugging Face hub (``task.split`` of it); `tasks.tables` says which split a row belongs to, and
`tasks.columns` which column is what. Where a column names the client, the data's clients take part, and ``task.unseen``
names those of the unseen pool. Where none does, the texts are dealt: half of every group's texts of every class to each
pool, and there to ``task.clients_per_language`` clients with the label skew of ``task.alpha``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.tasks.columns import (
    ONE_GROUP,
    in_order,
    label_cell,
    labelled_columns,
    name_cell,
    refuse_missing_labels,
    text_cell,
)
from fedtailor.tasks.config import AUTO, TaskConfig
from fedtailor.tasks.partition import LabelledSplit, natural_clients
from fedtailor.tasks.source import POOLS, SPLITS, Example, LanguagePool, Pool, Source, Split, TaskEntry, seeded_halves
from fedtailor.tasks.tables import own_table

Entry = tuple[str, str, Split | None, Example]
"""Client (empty where none is named), group, split and example of a row that was understood."""


def load(cfg: TaskConfig, seed: int) -> Source:
    """Labelled texts by client, where a column names it, else by pool and group.

    The classes are those of all rows, in an order that does not depend on the rows'. Rows without a text (of a pair,
    one of both) are dropped and counted.

    Args:
        cfg: keys of columns, `path`, `split`, `test_fraction` and `drop_duplicates` are used; with clients of the
            data's own also `unseen` and `max_examples`, else the keys that deal texts to clients.
        seed: run seed.

    Raises:
        ConfigError: no ``task.path``, or one that is neither there nor a hub id; a key that needs clients' names, and
            the data have none.
        DataError: a damaged file, a missing column, a row that cannot be used (names file and row), clients with too
            few texts, an unseen client that does not exist, or the hub cannot be reached.
    """
    table = own_table(cfg)
    columns = labelled_columns(table.columns, cfg, str(cfg.path))
    names = [name for name in (columns.text, columns.pair) if name]
    read = [
        (row, split, [text_cell(row, name) for name in names])
        for row, split in zip(table.rows, table.splits, strict=True)
    ]
    full = [(row, split, texts) for row, split, texts in read if all(map(str.strip, texts))]
    labels = [label_cell(row, columns.label) for row, *_ in full]
    unlabelled = [row.where for (row, *_), label in zip(full, labels, strict=True) if not label]
    refuse_missing_labels(unlabelled, len(full), columns.label)
    classes = in_order(set(labels))
    number = {label: i for i, label in enumerate(classes)}
    entries = [
        (
            name_cell(row, columns.client, "task.client_column") if columns.client else "",
            name_cell(row, columns.group, "task.group_column") if columns.group else ONE_GROUP,
            split,
            Example(texts[0], number[label], texts[1] if len(texts) > 1 else None),
        )
        for (row, split, texts), label in zip(full, labels, strict=True)
    ]
    if not entries:
        raise DataError(f"{cfg.path}: all {len(table.rows)} rows lack a text (column {columns.text!r})")
    notes = {**table.notes, "dropped_empty_texts": len(table.rows) - len(full)}
    used = {what: column for what, column in columns._asdict().items() if column}
    if columns.client:
        groups = _groups_of(entries)
        clients: dict[str, list[LabelledSplit]] = {name: [] for name in groups}
        for client, _, split, example in entries:
            clients[client].append(LabelledSplit(example, split))
        found = natural_clients(clients, lambda name, _: groups[name], cfg, seed)
        return Source(tuple(classes), notes=notes, natural_clients=tuple(found), columns=used)
    _refuse_names(cfg)
    if table.splits[0] is None:
        notes["split"] = f"{cfg.test_fraction:g} of every class for test"
    return Source(tuple(classes), pools=_pools(entries, cfg, seed), notes=notes, columns=used)


def _groups_of(entries: Sequence[Entry]) -> dict[str, str]:
    """Client, in the order of first appearance, to the group of most of its rows; the first of equals."""
    counts: dict[str, Counter[str]] = {}
    for client, group, _, _ in entries:
        counts.setdefault(client, Counter())[group] += 1
    return {client: min(found, key=lambda group: (-found[group], group)) for client, found in counts.items()}


def _refuse_names(cfg: TaskConfig) -> None:
    """Refuses keys that speak of the data's own clients where a column names none."""
    given = {"task.unseen": cfg.unseen, "task.max_examples": cfg.max_examples}
    problems = [
        f"'{key}' is for clients that the data name, and no column of {cfg.path} does (task.client_column)"
        for key, value in given.items()
        if value
    ]
    if problems:
        raise ConfigError(problems)


def _pools(entries: Sequence[Entry], cfg: TaskConfig, seed: int) -> dict[Pool, dict[str, LanguagePool]]:
    """Half of the texts of every group, split and class in each pool, and there some for test, if no row says which."""
    parts: dict[tuple[str, Split | None, int], list[Example]] = {}
    for _, group, split, example in entries:
        parts.setdefault((group, split, example.label), []).append(example)
    held: dict[tuple[Pool, str, Split], list[Example]] = {}
    for (group, split, label), examples in sorted(parts.items(), key=lambda item: tuple(map(str, item[0]))):
        for pool, half in seeded_halves(examples, seed, "texts", group, str(split), str(label)).items():
            tests = min(len(half) - 1, max(1, round(len(half) * cfg.test_fraction)))  # some of both, if there are two
            own: dict[Split, list[Example]] = {split: half} if split else {"train": half[tests:], "test": half[:tests]}
            for name, some in own.items():
                held.setdefault((pool, group, name), []).extend(some)
    if cfg.drop_duplicates:
        trained = {e.normal for (_, _, split), examples in held.items() if split == "train" for e in examples}
        for key in [key for key in held if key[2] == "test"]:
            held[key] = [e for e in held[key] if e.normal not in trained]
    groups = dict.fromkeys(group for _, group, _ in held)
    return {
        pool: {
            group: LanguagePool(*(tuple(held.get((pool, group, split), ())) for split in SPLITS)) for group in groups
        }
        for pool in POOLS
    }


ENTRY = TaskEntry(load, "classification", clients="either", defaults={"client_column": AUTO, "test_fraction": 0.2})
