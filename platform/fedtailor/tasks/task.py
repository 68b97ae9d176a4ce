"""From a task's config to clients on disk: load, partition, check for leaks, write, fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedtailor.core.errors import ConfigError, DataError, did_you_mean
from fedtailor.core.messages import Client
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.natural_clients import check_clients, check_instructions, natural_client_rows, subsample_clients
from fedtailor.tasks.partition import (
    Shard,
    Shards,
    client_id,
    first_clients,
    partition,
    reference_unseen_partition,
    resample,
)
from fedtailor.tasks.source import SPLITS, Example, Pool, Source, TaskEntry, check_leakage
from fedtailor.tasks.store import BLOCK, INSTRUCTIONS, PAIRS, TEXTS, HeldRows, TaskData, write_examples, write_stream

__all__ = ["TASKS", "Client", "TaskData", "fingerprint", "prepare", "task_config"]

_FILES: Final = (
    "cldr",
    "cldr_instruct",
    "masakhanews",
    "xnli",
    "dolly",
    "fed_aya",
    "instructions",
)
"""The rows: files beside this one, each with its ``ENTRY``, in the order in which they are listed."""

TASKS: Final[Mapping[str, TaskEntry]] = {name: import_module(f"fedtailor.tasks.{name}").ENTRY for name in _FILES}
"""Name of a task to its entry."""

_PLACE = {"path", "max_length", "template", "overlong"}
"""Keys that say where a task is read or how it becomes tokens, not what it holds."""

_INSTRUCTIONS_ONLY = {"unseen", "names", "client_column", "group_column", "split", "max_examples"}


def task_config(name: str, **given: Any) -> TaskConfig:
    """Section of a task of which only some keys are given; the others are as its entry has them.

    >>> task_config("xnli").clients_per_language, task_config("cldr").clients_per_language
    (20, 10)
    """
    return TaskConfig(**{"name": name, **TASKS[name].defaults, **given})


def prepare(cfg: TaskConfig, seed: int, out: Path) -> TaskData:
    """Writes ``manifest.json``, ``texts.arrow`` and ``examples.arrow`` to `out` and opens them.

    Equal (cfg, seed) give equal bytes. `out` should be a fresh folder; the caller makes it final.

    Raises:
        ConfigError: unknown task, or a key that this task's clients rule out.
        DataError: see the task's load function, `partition`, `natural_clients` and `check_leakage`.
    """
    source, client_rows = _dealt(cfg, seed)
    out.mkdir(parents=True, exist_ok=True)
    write_stream(out / "texts.arrow", _schema(source), _text_batches(source))
    write_examples(out / "examples.arrow", [(held.train, held.test) for held in client_rows])
    manifest = _manifest(cfg, seed, source, client_rows)
    text = json.dumps(manifest, ensure_ascii=False, indent=1, sort_keys=True)
    (out / "manifest.json").write_text(text + "\n", encoding="utf-8")
    return TaskData.open(out)


def fingerprint(cfg: TaskConfig, seed: int) -> str:
    """The hash that `prepare` would put into the manifest, without writing."""
    return str(_manifest(cfg, seed, *_dealt(cfg, seed))["hash"])


def _load(cfg: TaskConfig, seed: int) -> Source:
    if cfg.name not in TASKS:
        raise ConfigError(f"'task.name' is {cfg.name!r}, allowed: {', '.join(TASKS)}{did_you_mean(cfg.name, TASKS)}")
    source = TASKS[cfg.name].load(cfg, seed)
    if source.natural_clients:
        _refuse_dealing(cfg)
        check_clients(source)
    if source.kind == "generation":
        check_instructions(source)
        return source
    found = {e.label for _, _, part in source.parts() for e in part.train}
    if len(found) == 1:
        only = source.labels[found.pop()]
        raise DataError(f"task {cfg.name!r}: one class in the whole task ({only}); at least two are needed")
    return source


def _refuse_dealing(cfg: TaskConfig) -> None:
    """Raises ConfigError for keys that deal texts to clients, where the data names its clients."""
    dealing = {"task.resample": cfg.resample, "task.reference_unseen_partition": cfg.reference_unseen_partition}
    problems = [
        f"'{key}' deals texts to clients, and the clients of task {cfg.name!r} hold their own (remove it)"
        for key, value in dealing.items()
        if value
    ]
    if problems:
        raise ConfigError(problems)


def _dealt(cfg: TaskConfig, seed: int) -> tuple[Source, list[HeldRows]]:
    """The texts that stay, and who holds which."""
    source = _load(cfg, seed)
    if source.natural_clients:
        source = subsample_clients(source, cfg.clients_used, cfg.clients_per_language)
        return source, list(natural_client_rows(source))
    shards: Shards = {(pool, lang): _shards(source, pool, lang, cfg, seed) for pool, lang, _ in source.parts()}
    if cfg.clients_used < cfg.clients_per_language:
        source, shards = first_clients(source, shards, cfg.clients_used)
    return source, list(_client_rows(source, shards, cfg.clients_per_language))


def _shards(source: Source, pool: Pool, language: str, cfg: TaskConfig, seed: int) -> Iterator[Shard]:
    part, n = source.pools[pool][language], cfg.clients_per_language
    if cfg.resample:
        return resample(part, pool, language, n, cfg.alpha, cfg.resample, seed)
    if cfg.reference_unseen_partition and pool == "unseen":
        seen = source.pools["seen"][language]
        return reference_unseen_partition(part, language, partition(seen, "seen", language, n, cfg.alpha, seed), n)
    return partition(part, pool, language, n, cfg.alpha, seed)


def _client_rows(source: Source, shards: Shards, clients: int) -> Iterator[HeldRows]:
    first = 0
    for pool, language, part in source.parts():
        for index, shard in enumerate(shards[pool, language]):
            name = client_id(pool, language, index, clients)
            client = Client(name, pool, language, len(shard.train), len(shard.test))
            test = shard.test + first + len(part.train)
            yield HeldRows(client, (shard.train + first).astype(np.int32), test.astype(np.int32))
        first += len(part.train) + len(part.test)


def _examples(source: Source) -> Iterator[tuple[str, str, str, Example]]:
    for pool, language, part in source.parts():
        for split in SPLITS:
            for example in part.split(split):
                yield pool, source.labels[example.label] if source.natural_clients else language, split, example


def _schema(source: Source) -> pa.Schema:
    if source.kind == "generation":
        return INSTRUCTIONS
    return PAIRS if source.paired else TEXTS


def _text_batches(source: Source) -> Iterator[pa.RecordBatch]:
    schema = _schema(source)
    rows = (
        (pool, language, split, e.text, e.label, e.pair, e.history) for pool, language, split, e in _examples(source)
    )
    while block := list(islice(rows, BLOCK)):
        columns = [list(column) for column in zip(*block, strict=True)]
        yield pa.record_batch(columns[: len(schema)], schema=schema)


def _manifest(cfg: TaskConfig, seed: int, source: Source, client_rows: Sequence[HeldRows]) -> dict[str, Any]:
    examples = [e for *_, e in _examples(source)]
    digests = [_digest(e, source) for e in examples]
    labels = np.array([e.label for e in examples], dtype=np.int64)
    clients = [_client_entry(h, digests, labels, len(source.labels)) for h in client_rows]
    generation = source.kind == "generation"
    content = [list(source.labels), [[c["id"], c["sha256"]] for c in clients], *(["generation"] * generation)]
    hidden = _PLACE if generation else _PLACE | _INSTRUCTIONS_ONLY
    return {
        # Manifests from before there were two kinds stay what they were.
        **({"kind": source.kind} if generation else {}),
        "task": cfg.name,
        "config": cfg.model_dump(mode="json", exclude=hidden),
        "seed": seed,
        "labels": list(source.labels),
        "languages": sorted({o.language for o in source.natural_clients} or cfg.languages),
        "class_counts": _class_counts(source),
        "notes": dict(source.notes) | check_leakage(source) | {"unused_test_texts": _unused(source)},
        "rows": len(examples),
        "clients": clients,
        "hash": hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest(),
    }


def _digest(example: Example, source: Source) -> bytes:
    if source.kind == "generation":
        return hashlib.sha256(json.dumps(example, ensure_ascii=False).encode()).digest()
    texts = example.text if example.pair is None else f"{example.text}\0{example.pair}"
    return hashlib.sha256(f"{example.label}\0{texts}".encode()).digest()


def _client_entry(
    client_rows: HeldRows, digests: Sequence[bytes], labels: npt.NDArray[np.int64], classes: int
) -> dict[str, Any]:
    content = hashlib.sha256(f"{len(client_rows.train)}/{len(client_rows.test)}".encode())
    for row in chain(client_rows.train, client_rows.test):
        content.update(digests[row])
    return {
        "id": client_rows.client.id,
        "n_train": client_rows.client.n_train,
        "n_test": client_rows.client.n_test,
        "train_classes": np.bincount(labels[client_rows.train], minlength=classes).tolist(),
        "test_classes": np.bincount(labels[client_rows.test], minlength=classes).tolist(),
        "sha256": content.hexdigest(),
    }


def _class_counts(source: Source) -> dict[str, list[int]]:
    counts: dict[str, npt.NDArray[np.int64]] = {}
    for pool, language, part in source.parts():
        for split in SPLITS:
            # Clients of one predominant language are counted together.
            found = np.bincount([e.label for e in part.split(split)], minlength=len(source.labels))
            key = f"{pool}/{language}/{split}"
            counts[key] = counts.get(key, 0) + found
    return {key: found.tolist() for key, found in counts.items()}


def _unused(source: Source) -> int:
    """Test texts of a class that their pool's train part in that language lacks; of clients' own texts none."""
    unused = 0
    if source.natural_clients:
        return unused
    for _, _, part in source.parts():
        classes = {e.label for e in part.train}
        unused += sum(e.label not in classes for e in part.test)
    return unused
