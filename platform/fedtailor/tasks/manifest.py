"""The manifest of partitioned texts: whose they are, by content; classes, counts, and what was dropped or found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtailor.core.config import at_absent
from fedtailor.core.messages import Client
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.partition import Shard
from fedtailor.tasks.source import SPLITS, Example, Source, check_leakage

_PLACE = {"path", "max_length", "template", "overlong"}
"""Keys that say where a task is read or how it becomes tokens, not what it holds."""

_NO_TABLE = {"text_column", "pair_column", "label_column", "split_column"}
"""Keys that mean nothing to a task whose data are no table of the user's own."""

_INSTRUCTIONS_ONLY = {"unseen", "names", "client_column", "group_column", "split", "max_examples"}


def table_rows(source: Source) -> Iterator[tuple[str, str, str, Example]]:
    """Pool, language or group, split and example of every row of the table of texts, in its order."""
    own = source.kind == "generation" and source.natural_clients  # an instruction has a group of its own
    for pool, language, part in source.parts():
        for split in SPLITS:
            for example in part.split(split):
                yield pool, source.labels[example.label] if own else language, split, example


def manifest_of(
    cfg: TaskConfig,
    seed: int,
    source: Source,
    dealt: Sequence[tuple[Client, Shard]],
    validation: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """What a folder of clients says of itself, as JSON-like data.

    Args:
        cfg: section ``task``.
        seed: run seed.
        source: the texts.
        dealt: each client with its rows of their table.
        validation: rows of the validation pool by class, which the server sees; empty: there is none.
    """
    examples = [e for *_, e in table_rows(source)]
    digests = [_digest(e, source) for e in examples]
    labels = np.array([e.label for e in examples], dtype=np.int64)
    clients = [_client_entry(client, rows, digests, labels, len(source.labels)) for client, rows in dealt]
    generation = source.kind == "generation"
    named = {"kind": source.kind, "score": source.score}  # at their usual values no part of a manifest or a hash
    unusual = {key: value for key, value in named.items() if value not in ("classification", "accuracy")}
    content = [list(source.labels), [[c["id"], c["sha256"]] for c in clients], *unusual.values()]
    if validation:
        content.append([list(rows) for rows in validation.values()])
    hidden = _PLACE if source.columns else _PLACE | _NO_TABLE | (set() if generation else _INSTRUCTIONS_ONLY)
    return {
        **unusual,
        **({"columns": dict(source.columns)} if source.columns else {}),
        **({"truth": dict(source.truth)} if source.truth else {}),
        **({"several": True} if source.several else {}),
        **({"label_answers": source.label_answers} if source.label_answers else {}),
        **({"validation": validation} if validation else {}),
        "task": cfg.name,
        "config": cfg.model_dump(mode="json", exclude=hidden | at_absent(cfg).keys()),
        "seed": seed,
        "labels": list(source.labels),
        "languages": sorted({language for _, language, _ in source.parts()}),
        "class_counts": _class_counts(source),
        "notes": dict(source.notes) | check_leakage(source) | {"unused_test_texts": _unused(source)},
        "rows": len(examples),
        "clients": clients,
        "hash": hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest(),
    }


def _digest(example: Example, source: Source) -> bytes:
    if source.kind == "generation":
        said = (
            example.text,
            example.label,
            example.pair,
            example.history,
            *([example.others] if example.others else []),
        )
        return hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).digest()
    texts = "\0".join(text for text in (example.text, example.pair, example.answers) if text is not None)
    return hashlib.sha256(f"{example.label}\0{texts}".encode()).digest()


def _client_entry(
    client: Client, rows: Shard, digests: Sequence[bytes], labels: npt.NDArray[np.int64], classes: int
) -> dict[str, Any]:
    content = hashlib.sha256(f"{len(rows.train)}/{len(rows.test)}".encode())
    for row in chain(rows.train, rows.test):
        content.update(digests[row])
    return {
        "id": client.id,
        "n_train": client.n_train,
        "n_test": client.n_test,
        "train_classes": np.bincount(labels[rows.train], minlength=classes).tolist(),
        "test_classes": np.bincount(labels[rows.test], minlength=classes).tolist(),
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
    if source.natural_clients:
        return 0
    parts = [(part, {e.label for e in part.train}) for _, _, part in source.parts()]
    return sum(e.label not in classes for part, classes in parts for e in part.test)
