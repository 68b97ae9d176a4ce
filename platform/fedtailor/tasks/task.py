"""From a task's config to clients on disk: load, partition, check for leaks, write, fingerprint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from fedtailor.core.errors import ConfigError, DataError, did_you_mean, listed
from fedtailor.core.messages import Client
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.dealing import deal_tasks
from fedtailor.tasks.manifest import manifest_of, table_rows
from fedtailor.tasks.partition import (
    MIN_TEST,
    MIN_TRAIN,
    Shard,
    Shards,
    client_id,
    first_clients,
    partition,
    reference_unseen_partition,
    resample,
)
from fedtailor.tasks.sorted_share import sorted_partition
from fedtailor.tasks.source import (
    POOLS,
    SPLITS,
    Example,
    NaturalClient,
    Pool,
    Source,
    TaskEntry,
    all_seen,
)
from fedtailor.tasks.store import (
    BLOCK,
    INSTRUCTIONS,
    PAIRS,
    QUESTIONS,
    REFERENCES,
    TEXTS,
    TaskData,
    write_examples,
    write_stream,
)
from fedtailor.tasks.validation import draw_pool

__all__ = ["TASKS", "Client", "TaskData", "prepare", "task_config"]

_FILES: Final = (
    "cldr",
    "cldr_instruct",
    "masakhanews",
    "xnli",
    "glue",
    "dolly",
    "dolly_category",
    "flan",
    "fed_aya",
    "webnlg",
    "e2e",
    "instructions",
    "texts",
    "pf2lora_synthetic",
    "squad",
)
"""The rows: files beside this one, each with its ``ENTRY``, in the order in which they are listed."""

TASKS: Final[Mapping[str, TaskEntry]] = {name: import_module(f"fedtailor.tasks.{name}").ENTRY for name in _FILES}
"""Name of a task to its entry."""


def task_config(name: str, **given: Any) -> TaskConfig:
    """Section of a task of which only some keys are given; the others are as its entry has them.

    >>> task_config("xnli").clients_per_language, task_config("cldr").clients_per_language
    (20, 10)
    """
    return TaskConfig(**{"name": name, **TASKS[name].defaults, **given})


def prepare(cfg: TaskConfig, seed: int, out: Path, source: Source | None = None) -> TaskData:
    """Writes ``manifest.json``, ``texts.arrow`` and ``examples.arrow`` to `out` and opens them.

    Equal (cfg, seed) give equal bytes. `out` should be a fresh folder; the caller makes it final.

    Args:
        cfg: section ``task``.
        seed: run seed.
        out: folder to write to.
        source: the task's texts, where they are at hand and checked; None: its own are loaded.

    Raises:
        ConfigError: unknown task, or a key that this task's clients rule out.
        DataError: see the task's load function, `partition` and `check_leakage`; or a client or an example that
            cannot serve (names it).
    """
    drawn = cfg.validation_per_class if source is None else 0  # not from the rows of a new client
    source, clients = _dealt(cfg, seed, source)
    validation = draw_pool(source, clients, drawn, seed)
    out.mkdir(parents=True, exist_ok=True)
    write_stream(out / "texts.arrow", _schema(source), _text_batches(source))
    write_examples(out / "examples.arrow", [(rows.train, rows.test) for _, rows in clients])
    manifest = manifest_of(cfg, seed, source, clients, validation)
    text = json.dumps(manifest, ensure_ascii=False, indent=1, sort_keys=True)
    (out / "manifest.json").write_text(text + "\n", encoding="utf-8")
    return TaskData.open(out)


def _load(cfg: TaskConfig, seed: int) -> Source:
    if cfg.name not in TASKS:
        raise ConfigError(f"'task.name' is {cfg.name!r}, allowed: {', '.join(TASKS)}{did_you_mean(cfg.name, TASKS)}")
    source = TASKS[cfg.name].load(cfg, seed)
    if source.natural_clients:
        _check_clients(cfg, source)
    if source.kind == "generation":
        _check_instructions(source)
        return source
    if source.kind in ("regression", "extraction"):
        return source
    found = {e.label for _, _, part in source.parts() for e in part.train}
    if len(found) == 1:
        only = source.labels[found.pop()]
        raise DataError(f"task {cfg.name!r}: one class in the whole task ({only}); at least two are needed")
    return source


def _check_clients(cfg: TaskConfig, source: Source) -> None:
    """Refuses keys that deal texts to clients, where the data names its clients, and clients that cannot serve."""
    keys = ("resample", "reference_unseen_partition", "sorted_share")
    dealing = {f"task.{key}": getattr(cfg, key) not in (None, False, 0) for key in keys}
    dealing["task.pools"] = len(cfg.pools) < len(POOLS)
    problems = [
        f"'{key}' deals texts to clients, and the clients of task {cfg.name!r} hold their own (remove it)"
        for key, value in dealing.items()
        if value
    ]
    if problems:
        raise ConfigError(problems)
    counts = Counter(client.id for client in source.natural_clients)
    for client in source.natural_clients:
        if any(not part or "/" in part for part in (client.language, client.name)):
            raise DataError(f"client {client.id!r}: neither part of an id after the pool may be empty or have a slash")
        if counts[client.id] > 1:
            raise DataError(f"client {client.id!r}: {counts[client.id]} clients have this id")
    few = [
        f"client {client.id!r} has {len(client.train)} train and {len(client.test)} test examples"
        for client in source.natural_clients
        if len(client.train) < MIN_TRAIN or len(client.test) < MIN_TEST
    ]
    if few:
        raise DataError(f"{listed(few)}; every client needs at least {MIN_TRAIN} and {MIN_TEST}")
    if all(client.pool != "seen" for client in source.natural_clients):
        count = len(source.natural_clients)
        raise DataError(f"all {count} clients are unseen; at least one must be seen (task.unseen)")


def _check_instructions(source: Source) -> None:
    """Refuses what cannot be asked or answered; names client (or pool and language), split and place."""
    for pool, language, part in source.parts():
        where = f"client {part.id!r}" if isinstance(part, NaturalClient) else f"{pool}/{language}"
        for split in SPLITS:
            for number, example in enumerate(part.split(split), start=1):
                for what, text in (("instruction", example.text), ("response", example.pair or "")):
                    if not text.strip():
                        raise DataError(f"{where}: {split} example {number} has no {what}")


def _dealt(cfg: TaskConfig, seed: int, source: Source | None = None) -> tuple[Source, list[tuple[Client, Shard]]]:
    """The texts, and each client with its rows of their table, seen clients first."""
    source = source or _load(cfg, seed)
    if len(cfg.pools) < len(POOLS):
        source = all_seen(source)
    n = cfg.clients_per_language
    shards: Shards = {}
    if source.natural_clients:
        source = _first_share(source, cfg.clients_used, n)
    else:
        if cfg.dealing is None:
            shards = {(pool, lang): _shards(source, pool, lang, cfg, seed) for pool, lang, _ in source.parts()}
        else:
            source, shards = deal_tasks(source, cfg, seed)
        if cfg.clients_used < n or cfg.dealing is not None:
            source, shards = first_clients(source, shards, cfg.clients_used)
    clients, first = [], 0
    for pool, language, part in source.parts():
        middle, end = first + len(part.train), first + len(part.train) + len(part.test)
        if isinstance(part, NaturalClient):
            named = [(part.id, Shard(np.arange(first, middle), np.arange(middle, end)))]
        else:
            dealt = enumerate(shards[pool, language])
            named = [(client_id(pool, language, i, n), Shard(s.train + first, s.test + middle)) for i, s in dealt]
        clients += [(Client(name, pool, language, len(s.train), len(s.test)), s) for name, s in named]
        first = end
    return source, clients


def _first_share(source: Source, kept: int, of: int) -> Source:
    """The first ``kept / of`` of each pool's clients, rounded, but at least one where the pool has any.

    Dirichlet partitions keep `kept` of their `of` clients per language; so this keeps the same share.
    """
    some: list[NaturalClient] = []
    for pool in POOLS:
        members = [client for client in source.natural_clients if client.pool == pool]
        some += members[: max(1, (2 * len(members) * kept + of) // (2 * of))]
    return replace(source, natural_clients=tuple(some))


def _shards(source: Source, pool: Pool, language: str, cfg: TaskConfig, seed: int) -> Iterator[Shard]:
    part, n = source.pools[pool][language], cfg.clients_per_language
    if cfg.sorted_share is not None:
        return sorted_partition(part, pool, language, cfg, source.labels, seed, source.kind == "extraction")
    if cfg.resample:
        return resample(part, pool, language, n, cfg.alpha, cfg.resample, seed)
    if cfg.reference_unseen_partition and pool == "unseen":
        seen = source.pools["seen"][language]
        return reference_unseen_partition(part, language, partition(seen, "seen", language, n, cfg.alpha, seed), n)
    return partition(part, pool, language, n, cfg.alpha, seed)


def _schema(source: Source) -> pa.Schema:
    if source.kind == "generation":
        return REFERENCES if source.several else INSTRUCTIONS
    if source.kind == "extraction":
        return QUESTIONS
    return PAIRS if source.paired else TEXTS


def _text_batches(source: Source) -> Iterator[pa.RecordBatch]:
    schema = _schema(source)
    own = [name for name in schema.names if name in Example._fields]
    rows = (
        (pool, language, split, *(getattr(e, name) for name in own)) for pool, language, split, e in table_rows(source)
    )
    while block := list(islice(rows, BLOCK)):
        yield pa.record_batch([list(column) for column in zip(*block, strict=True)], schema=schema)
