"""Texts that occur where they should not: in two pools, or in train and test of one pool."""

from __future__ import annotations

from fedtailor.core.errors import DataError
from fedtailor.tasks.source import POOLS, SPLITS, Source


def check(source: Source) -> dict[str, int]:
    """Counts normalised texts shared by the pools, and by train and test of each pool, over all languages.

    Of a sentence-pair task, pairs are counted.

    Returns:
        ``leak_seen_unseen``, ``leak_seen_train_test``, ``leak_unseen_train_test``.

    Raises:
        DataError: the source promises disjoint texts and they are not.
    """
    texts: dict[tuple[str, str], set[str]] = {(pool, split): set() for pool in POOLS for split in SPLITS}
    for pool, _, part in source.parts():
        for split in SPLITS:
            texts[pool, split].update(e.normal for e in part.split(split))
    pools = [texts[pool, "train"] | texts[pool, "test"] for pool in POOLS]
    leaks = {"leak_seen_unseen": len(pools[0] & pools[1])}
    for pool in POOLS:
        leaks[f"leak_{pool}_train_test"] = len(texts[pool, "train"] & texts[pool, "test"])
    if source.disjoint and any(leaks.values()):
        raise DataError(f"texts leak between pools or splits: {leaks}")
    return leaks
