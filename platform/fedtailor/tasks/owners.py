"""Clients that a source names itself: what they must be, the share that is kept, the rows they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from fedtailor.core.errors import DataError
from fedtailor.tasks.partition import MIN_TEST, MIN_TRAIN
from fedtailor.tasks.source import POOLS, SPLITS, Example, Owner, Source
from fedtailor.tasks.store import Client, Holding


def owner_id(owner: Owner) -> str:
    """``seen/eng/17``."""
    return f"{owner.pool}/{owner.language}/{owner.name}"


def check_owners(source: Source) -> None:
    """Refuses clients that cannot train or be judged, and populations that nothing could be learned from.

    Raises:
        DataError: names the client: too few examples, a part of its id that is empty or has a slash, an id that another
            client has; or no client is seen.
    """
    counts = Counter(map(owner_id, source.owners))
    for owner in source.owners:
        name = owner_id(owner)
        if any(not part or "/" in part for part in (owner.language, owner.name)):
            raise DataError(f"client {name!r}: neither part of an id after the pool may be empty or have a slash")
        if counts[name] > 1:
            raise DataError(f"client {name!r}: {counts[name]} clients have this id")
        if len(owner.train) < MIN_TRAIN or len(owner.test) < MIN_TEST:
            raise DataError(
                f"client {name!r} has {len(owner.train)} train and {len(owner.test)} test examples; at least "
                f"{MIN_TRAIN} and {MIN_TEST} are needed"
            )
    if all(owner.pool != "seen" for owner in source.owners):
        raise DataError(f"all {len(source.owners)} clients are unseen; at least one must be seen (task.unseen)")


def check_instructions(source: Source) -> None:
    """Refuses what cannot be asked or answered.

    Raises:
        DataError: an example without an instruction or a response; names its client (or pool and language), split and
            place.
    """
    for pool, language, part in source.parts():
        where = f"client {owner_id(part)!r}" if isinstance(part, Owner) else f"{pool}/{language}"
        for split in SPLITS:
            for number, example in enumerate(part.split(split), start=1):
                if missing := _missing(example):
                    raise DataError(f"{where}: {split} example {number} has no {missing}")


def _missing(example: Example) -> str:
    if not example.text.strip():
        return "instruction"
    return "" if example.pair and example.pair.strip() else "response"


def keep_share(source: Source, kept: int, of: int) -> Source:
    """The first ``kept / of`` of each pool's clients, rounded, but at least one where the pool has any.

    Dirichlet partitions keep `kept` of their `of` clients per language; so this keeps the same share.
    """
    some: list[Owner] = []
    for pool in POOLS:
        members = [owner for owner in source.owners if owner.pool == pool]
        some += members[: max(1, (2 * len(members) * kept + of) // (2 * of))]
    return replace(source, owners=tuple(some))


def own_holdings(source: Source) -> Iterator[Holding]:
    """Each client's consecutive rows, seen clients first, both pools in the source's order."""
    first = 0
    for _, _, part in source.parts():
        if not isinstance(part, Owner):
            raise TypeError("this source names no clients")
        train, test = len(part.train), len(part.test)
        rows = np.arange(first, first + train + test, dtype=np.int32)
        client = Client(owner_id(part), part.pool, part.language, train, test)
        yield Holding(client, rows[:train], rows[train:])
        first += train + test
