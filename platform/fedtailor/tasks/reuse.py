"""Partitions made from other partitions: the first clients only, or the seen pool's rows once more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from fedtailor.core.errors import DataError
from fedtailor.tasks.partition import MIN_TEST, MIN_TRAIN, Ints, Shard, client_id
from fedtailor.tasks.source import POOLS, Example, LanguagePool, Pool, Source

Shards = Mapping[tuple[Pool, str], Iterable[Shard]]
"""(pool, language) -> what each client holds, by index; may be read once, as populations can be large."""


def keep_first(source: Source, shards: Shards, clients: int) -> tuple[Source, Shards]:
    """The first clients of each language and pool, with the texts that they have in the whole task.

    Returns:
        The source without the texts that none of them holds, and the shards in its row numbers.
    """
    pools: dict[Pool, dict[str, LanguagePool]] = {pool: {} for pool in POOLS}
    kept: dict[tuple[Pool, str], Iterable[Shard]] = {}
    for pool, language, part in source.parts():
        some = list(islice(shards[pool, language], clients))
        train, train_rows = _compact(part.train, [s.train for s in some])
        test, test_rows = _compact(part.test, [s.test for s in some])
        pools[pool][language] = LanguagePool(train, test)
        kept[pool, language] = list(map(Shard, train_rows, test_rows))
    return replace(source, pools=pools), kept


def _compact(examples: Sequence[Example], rows: Sequence[Ints]) -> tuple[list[Example], list[Ints]]:
    used = np.unique(np.concatenate(rows))
    return [examples[row] for row in used], [np.searchsorted(used, held).astype(np.int64) for held in rows]


def repeat_on(part: LanguagePool, language: str, seen: Iterator[Shard], clients: int) -> Iterator[Shard]:
    """Deals the unseen pool by the row numbers of the seen pool's shards; numbers that it lacks are left out.

    So does the reference code for XNLI: the rows' own labels play no part (FedP2EFT's code, data/xnli_dataset.py).

    Raises:
        DataError: a client would have fewer than 2 train texts or no test text; names it.
    """
    for index, shard in enumerate(seen):
        train, test = shard.train[shard.train < len(part.train)], shard.test[shard.test < len(part.test)]
        if len(train) < MIN_TRAIN or len(test) < MIN_TEST:
            raise DataError(
                f"client {client_id('unseen', language, index, clients)} would have {len(train)} train and {len(test)} "
                "test texts: the unseen pool is too small for the seen pool's rows (task.reference_unseen_partition)"
            )
        yield Shard(train, test)
