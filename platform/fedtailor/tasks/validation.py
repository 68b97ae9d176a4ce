"""The validation pool: training rows of seen clients that the server sees, on which methods tune for all clients.

pFedGPT (Shen et al., EMNLP 2025) takes 40 training rows of each class, tunes its mixtures on them and does not train on
them; the methods that it is compared with train on all rows. The pool is a public set that is made of clients' data: no
privacy mechanism covers it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtailor.core.errors import DataError, listed
from fedtailor.core.messages import Client
from fedtailor.core.seeding import numpy_rng
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.manifest import table_rows
from fedtailor.tasks.partition import MIN_TRAIN, Shard
from fedtailor.tasks.source import Source

Ints = npt.NDArray[np.int64]
Pool = Mapping[str, Sequence[int]]
"""Class to its rows of the table of texts, ascending."""


def draw_pool(source: Source, dealt: Sequence[tuple[Client, Shard]], per_class: int, seed: int) -> Pool:
    """So many training rows of each class that seen clients train on, drawn by (seed, class).

    Which rows are drawn does not depend on how they are dealt to clients.

    Args:
        source: the texts.
        dealt: each client with its rows of their table.
        per_class: ``task.validation_per_class``; 0: there is no pool.
        seed: run seed.

    Raises:
        DataError: a class would have no training row left, or a client fewer than 2; names all, with their counts.
    """
    if not per_class:
        return {}
    labels = np.array([example.label for *_, example in table_rows(source)], dtype=np.int64)
    held = {client.id: rows.train for client, rows in dealt if client.pool == "seen"}
    rows = np.unique(np.concatenate(list(held.values())))
    by_class = {source.labels[number]: rows[labels[rows] == number] for number in np.unique(labels[rows])}
    asked = f"'task.validation_per_class' = {per_class}"
    if few := [f"class {name!r} has {len(own)}" for name, own in by_class.items() if len(own) <= per_class]:
        most = min(map(len, by_class.values())) - 1
        raise DataError(
            f"{asked} takes all training rows of a class: {listed(few)} at seen clients; at most {most} leave each "
            "class a row to train on"
        )
    drawn = {
        name: np.sort(numpy_rng(seed, "validation pool", name).permutation(own)[:per_class]).tolist()
        for name, own in by_class.items()
    }
    left = {client: len(_without(own, drawn)) for client, own in held.items()}
    if bare := [f"{client!r} keeps {n} of {len(held[client])}" for client, n in left.items() if n < MIN_TRAIN]:
        raise DataError(
            f"{asked} leaves clients fewer than the {MIN_TRAIN} training rows that are needed: client {listed(bare)}; "
            "take fewer rows, or fewer and larger clients"
        )
    return drawn


def pool_notes(manifest: Mapping[str, Any], lengths: Ints, trained: Sequence[Ints]) -> dict[str, Pool]:
    """The pool as a part of the tokens' manifest, without rows that were dropped because they are too long.

    Args:
        manifest: of the texts.
        lengths: tokens of every row of the table, 0 of those that were dropped, (n,).
        trained: rows that each client trains on, the pool's included.

    Raises:
        DataError: nothing is left of a class, or for a client to train on; names it.
    """
    drawn: Pool = manifest.get("validation", {})
    kept = {name: [row for row in rows if lengths[row]] for name, rows in drawn.items()}
    for name, rows in kept.items():
        if not rows:
            raise DataError(
                f"class {name!r}: all {len(drawn[name])} rows of the validation pool are longer than 'task.max_length' "
                "and 'task.overlong' is 'drop'; raise max_length, or set task.overlong=cut_prompt"
            )
    for client, own in zip(manifest["clients"], trained, strict=True):
        if drawn and not len(_without(own, kept)):
            raise DataError(
                f"client {client['id']!r} would train on rows of the validation pool alone: its other rows are longer "
                "than 'task.max_length' and 'task.overlong' is 'drop'"
            )
    return {"validation": kept} if kept else {}


def _without(rows: Ints, pool: Pool) -> Ints:
    return rows[~np.isin(rows, [row for own in pool.values() for row in own])]


def pool_sentence(cfg: TaskConfig, kind: str) -> str:
    """What captions and plans say of the pool; empty where there is none.

    >>> pool_sentence(TaskConfig(validation_per_class=40), "generation")[:67]
    'Validation pool: 40 training rows of each group of seen clients are'
    """
    if not cfg.validation_per_class:
        return ""
    what = "group" if kind == "generation" else "class"
    return (
        f"Validation pool: {cfg.validation_per_class} training rows of each {what} of seen clients are seen by the "
        "server and no longer private; methods that tune on them do not train on them, the others do."
    )
