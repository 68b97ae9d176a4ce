"""Clients that the data names: what they must be, pools, the split into train and test, the share that is kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fedtailor.core.errors import DataError, did_you_mean, listed
from fedtailor.core.messages import Client
from fedtailor.core.seeding import numpy_rng
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.partition import MIN_TEST, MIN_TRAIN
from fedtailor.tasks.source import POOLS, SPLITS, Example, NaturalClient, Pool, Source, Split
from fedtailor.tasks.store import HeldRows

MIN_EXAMPLES = MIN_TRAIN + MIN_TEST


class LabelledSplit(NamedTuple):
    """An example of a client; `split` where the data itself says whether it is for train or test."""

    example: Example
    split: Split | None = None


def id_part(name: str) -> str:
    """A name as part of a client's id, whose parts are joined by slashes.

    >>> id_part("a/b"), id_part("50%")
    ('a%2Fb', '50%25')
    """
    return name.replace("%", "%25").replace("/", "%2F")


def natural_clients(
    clients: Mapping[str, Sequence[LabelledSplit]], groups: Sequence[str], cfg: TaskConfig, seed: int
) -> list[NaturalClient]:
    """One `NaturalClient` per client, in the order given.

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
            enough of them, and that a client is seen, is for the caller to check (`tasks.natural_clients`).
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
        found.append(NaturalClient(name, pool, groups[int(counts.argmax())], tuple(train), tuple(test)))
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
            hint = did_you_mean(name, known)
            raise DataError(f"task.unseen: no client {name!r} among the {len(known)} clients ({listed(known)}){hint}")


def _unseen(unseen: Iterable[str], clients: Iterable[str]) -> frozenset[str]:
    names = [id_part(name) for name in unseen]
    check_unseen(names, clients)
    return frozenset(names)


def _split(name: str, held: Sequence[LabelledSplit], cfg: TaskConfig, seed: int) -> tuple[list[Example], list[Example]]:
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


def natural_client_id(client: NaturalClient) -> str:
    """``seen/eng/17``."""
    return f"{client.pool}/{client.language}/{client.name}"


def check_clients(source: Source) -> None:
    """Refuses clients that cannot train or be judged, and populations that nothing could be learned from.

    Raises:
        DataError: names the client: too few examples, a part of its id that is empty or has a slash, an id that another
            client has; or no client is seen.
    """
    counts = Counter(map(natural_client_id, source.natural_clients))
    for client in source.natural_clients:
        name = natural_client_id(client)
        if any(not part or "/" in part for part in (client.language, client.name)):
            raise DataError(f"client {name!r}: neither part of an id after the pool may be empty or have a slash")
        if counts[name] > 1:
            raise DataError(f"client {name!r}: {counts[name]} clients have this id")
        if len(client.train) < MIN_TRAIN or len(client.test) < MIN_TEST:
            raise DataError(
                f"client {name!r} has {len(client.train)} train and {len(client.test)} test examples; at least "
                f"{MIN_TRAIN} and {MIN_TEST} are needed"
            )
    if all(client.pool != "seen" for client in source.natural_clients):
        count = len(source.natural_clients)
        raise DataError(f"all {count} clients are unseen; at least one must be seen (task.unseen)")


def check_instructions(source: Source) -> None:
    """Refuses what cannot be asked or answered.

    Raises:
        DataError: an example without an instruction or a response; names its client (or pool and language), split and
            place.
    """
    for pool, language, part in source.parts():
        where = f"client {natural_client_id(part)!r}" if isinstance(part, NaturalClient) else f"{pool}/{language}"
        for split in SPLITS:
            for number, example in enumerate(part.split(split), start=1):
                if missing := _missing(example):
                    raise DataError(f"{where}: {split} example {number} has no {missing}")


def _missing(example: Example) -> str:
    if not example.text.strip():
        return "instruction"
    return "" if example.pair and example.pair.strip() else "response"


def subsample_clients(source: Source, kept: int, of: int) -> Source:
    """The first ``kept / of`` of each pool's clients, rounded, but at least one where the pool has any.

    Dirichlet partitions keep `kept` of their `of` clients per language; so this keeps the same share.
    """
    some: list[NaturalClient] = []
    for pool in POOLS:
        members = [client for client in source.natural_clients if client.pool == pool]
        some += members[: max(1, (2 * len(members) * kept + of) // (2 * of))]
    return replace(source, natural_clients=tuple(some))


def natural_client_rows(source: Source) -> Iterator[HeldRows]:
    """Each client's consecutive rows, seen clients first, both pools in the source's order."""
    first = 0
    for _, _, part in source.parts():
        if not isinstance(part, NaturalClient):
            raise TypeError("this source names no clients")
        train, test = len(part.train), len(part.test)
        rows = np.arange(first, first + train + test, dtype=np.int32)
        client = Client(natural_client_id(part), part.pool, part.language, train, test)
        yield HeldRows(client, rows[:train], rows[train:])
        first += train + test
