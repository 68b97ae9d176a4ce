"""Clients that the data names: into pools, split into train and test, cut to a size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

import numpy as np

from fedtailor.core.errors import DataError
from fedtailor.core.seeding import numpy_rng
from fedtailor.core.task_settings import TaskConfig
from fedtailor.tasks.partition import MIN_TEST, MIN_TRAIN
from fedtailor.tasks.source import Example, Owner, Pool, Split

MIN_EXAMPLES = MIN_TRAIN + MIN_TEST


class Held(NamedTuple):
    """An example of a client; `split` where the data itself says whether it is for train or test."""

    example: Example
    split: Split | None = None


def id_part(name: str) -> str:
    """A name as part of a client's id, whose parts are joined by slashes.

    >>> id_part("a/b"), id_part("50%")
    ('a%2Fb', '50%25')
    """
    return name.replace("%", "%25").replace("/", "%2F")


def owners(clients: Mapping[str, Sequence[Held]], groups: Sequence[str], cfg: TaskConfig, seed: int) -> list[Owner]:
    """One `Owner` per client, in the order given.

    Train and test are the data's own where it says so, in its order; else a client's examples are shuffled by
    (seed, client) and ``task.test_fraction`` of them, rounded up, are test. ``task.max_examples`` keeps the first
    of them after shuffling. A test example that some client trains on is dropped under ``task.drop_duplicates``.

    Args:
        clients: name -> its examples.
        groups: what `Example.label` counts.
        cfg: `unseen`, `test_fraction`, `max_examples` and `drop_duplicates` are used.
        seed: run seed.

    Raises:
        DataError: a client has too few examples (names it), or an unseen client does not exist. That both splits have
            enough of them, and that a client is seen, is for the caller to check (`tasks.owners`).
    """
    unseen = _unseen(cfg.unseen, clients)
    parts = {name: _split(name, held, cfg, seed) for name, held in clients.items()}
    if cfg.drop_duplicates:
        trained = {e.normal for train, _ in parts.values() for e in train}
        parts = {name: (train, [e for e in test if e.normal not in trained]) for name, (train, test) in parts.items()}
    found = []
    for name, (train, test) in parts.items():
        counts = np.bincount([e.label for e in (*train, *test)], minlength=len(groups))
        pool: Pool = "unseen" if name in unseen else "seen"
        found.append(Owner(name, pool, groups[int(counts.argmax())], tuple(train), tuple(test)))
    return found


def held_out(n: int, fraction: float) -> int:
    """How many of n examples are for test: the fraction rounded up, but 2 are left to train on.

    >>> held_out(10, 0.2), held_out(11, 0.2), held_out(3, 0.9)
    (2, 3, 1)
    """
    return max(MIN_TEST, min(math.ceil(fraction * n), n - MIN_TRAIN))


def check_unseen(unseen: Iterable[str], clients: Iterable[str]) -> None:
    """Raises DataError for an id of ``task.unseen`` that no client has; names the nearest."""
    known = list(clients)
    for name in unseen:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise DataError(f"task.unseen: no client {name!r} among the {len(known)} clients ({_some(known)}){hint}")


def _unseen(unseen: Iterable[str], clients: Iterable[str]) -> frozenset[str]:
    names = [id_part(name) for name in unseen]
    check_unseen(names, clients)
    return frozenset(names)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} ... {names[-1]}"


def _split(name: str, held: Sequence[Held], cfg: TaskConfig, seed: int) -> tuple[list[Example], list[Example]]:
    if len(held) < MIN_EXAMPLES:
        raise DataError(
            f"client {name!r} has {len(held)} example{'s' * (len(held) != 1)} with a response; at least {MIN_EXAMPLES} "
            f"are needed, {MIN_TRAIN} to train on and {MIN_TEST} to be judged by"
        )
    order = numpy_rng(seed, "client examples", name).permutation(len(held))
    shuffled = [held[i] for i in order]
    if held[0].split is None:
        kept = [h.example for h in shuffled[: cfg.max_examples]]
        n = held_out(len(kept), cfg.test_fraction)
        return kept[n:], kept[:n]
    if cfg.max_examples is None or len(held) <= cfg.max_examples:
        shuffled = list(held)
    train, test = ([h.example for h in shuffled if h.split == split] for split in ("train", "test"))
    if cfg.max_examples is not None and len(held) > cfg.max_examples:
        n = min(len(test), held_out(cfg.max_examples, len(test) / len(held)))
        return train[: cfg.max_examples - n], test[:n]
    return train, test
