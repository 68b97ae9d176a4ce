"""Which client has which texts: Dirichlet label skew, partitions made from other partitions, clients of the data's own.

Paper: FedP2EFT (arXiv 2502.04387) section 4.1.1, after Hsu et al. 2019 (arXiv 1909.06335). Per language
and pool: a row of class probabilities per client, p_i ~ Dirichlet(alpha 1_C), C classes in the train part;
clients are filled one after another by drawing classes without replacement. Late clients get leftovers, so
p_i is a tendency, not the client's exact class share. Test texts use the same p_i as train texts.
Deviation from the reference code: each (pool, language) draws its own matrix, from its own labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedtailor.core.errors import DataError, did_you_mean, listed
from fedtailor.core.seeding import numpy_rng
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.source import POOLS, SPLITS, Example, LanguagePool, NaturalClient, Pool, Source, Split, look_alikes

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
MIN_TRAIN, MIN_TEST = 2, 1
MIN_EXAMPLES = MIN_TRAIN + MIN_TEST
_FLOOR = 1e-5
"""Added to the classes that are left when one is empty (reference code), so that their sum is never 0."""


@dataclass(frozen=True)
class Shard:
    """One client's texts as int64 indices into the train and test texts of its language pool."""

    train: Ints
    test: Ints


def client_id(pool: str, language: str, index: int, clients: int) -> str:
    """``seen/amh/00``; the index is padded so that ids sort by number."""
    return f"{pool}/{language}/{index:0{max(2, len(str(clients - 1)))}d}"


def partition(part: LanguagePool, pool: Pool, language: str, clients: int, alpha: float, seed: int) -> Iterator[Shard]:
    """Deals every train and test text to exactly one client; sizes differ by at most 1.

    A test text of a class that the train part lacks belongs to no client: its prior is 0.

    Raises:
        DataError: a client would have fewer than 2 train texts or no test text; names it.
    """
    rng = numpy_rng(seed, "partition", pool, language)
    train, test = _labels(part.train), _labels(part.test)
    classes = np.unique(train)
    usable = int(np.isin(test, classes).sum())
    _check_sizes(pool, language, len(train), usable, clients)
    priors = rng.dirichlet(np.full(len(classes), alpha), size=clients)
    yield from map(Shard, _deal(train, classes, priors, rng), _deal(test, classes, priors, rng))


def resample(
    part: LanguagePool, pool: Pool, language: str, clients: int, alpha: float, n: int, seed: int
) -> Iterator[Shard]:
    """Draws n train and n // 3 + 1 test texts per client with replacement; class shares follow its prior.

    A client's draw depends on its index, not on the number of clients; time is linear in `clients`,
    memory constant.

    Raises:
        DataError: n below 2, or the language has no train text or no usable test text.
    """
    train, test = _labels(part.train), _labels(part.test)
    classes = np.unique(train)
    if n < MIN_TRAIN:
        raise DataError(f"task.resample: {n} train text per client; at least {MIN_TRAIN} are needed")
    if not len(train) or not np.isin(test, classes).any():
        raise DataError(
            f"client {client_id(pool, language, 0, clients)} would be empty: language {language!r} has "
            f"{len(train)} train and {len(test)} test texts in the {pool} pool, no class has both"
        )
    by_class = [(np.flatnonzero(train == c), np.flatnonzero(test == c)) for c in classes]
    for index in range(clients):
        rng = numpy_rng(seed, "resample", pool, language, index)
        prior = rng.dirichlet(np.full(len(classes), alpha))
        yield Shard(
            train=_draw([rows for rows, _ in by_class], prior, n, rng),
            test=_draw([rows for _, rows in by_class], prior, n // 3 + 1, rng),
        )


def _labels(examples: Sequence[Example]) -> Ints:
    return np.array([example.label for example in examples], dtype=np.int64)


def _check_sizes(pool: Pool, language: str, train: int, test: int, clients: int) -> None:
    fit = min(train // MIN_TRAIN, test // MIN_TEST)
    if fit >= clients:
        return
    split, have, need = ("train", train, MIN_TRAIN) if train < MIN_TRAIN * clients else ("test", test, MIN_TEST)
    share = have // clients
    problem = "would be empty" if not share else f"would have {share} {split} text and needs {need}"
    raise DataError(
        f"client {client_id(pool, language, have % clients, clients)} {problem}: language {language!r} has "
        f"{train} train and {test} usable test texts in the {pool} pool for {clients} clients; "
        f"at most {fit} would fit (task.clients_per_language)"
    )


def _deal(labels: Ints, classes: Ints, priors: Floats, rng: np.random.Generator) -> Iterator[Ints]:
    """Yields each client's indices, (quota,) int64, in the order drawn."""
    stacks = [rng.permutation(np.flatnonzero(labels == c)) for c in classes]
    used = np.zeros(len(classes), dtype=np.int64)
    left = np.array([len(stack) for stack in stacks], dtype=np.int64)
    quotas = np.full(len(priors), left.sum() // len(priors))
    quotas[: left.sum() % len(priors)] += 1
    for prior, quota in zip(priors, quotas, strict=True):
        drawn = _draw_classes(prior, left, rng.random(quota))
        rows = np.empty(quota, dtype=np.int64)
        for c, stack in enumerate(stacks):
            at = np.flatnonzero(drawn == c)
            rows[at] = stack[used[c] : used[c] + len(at)]
            used[c] += len(at)
        yield rows


def _draw_classes(prior: Floats, left: Ints, uniforms: Floats) -> Ints:
    """Class of each draw, (quota,) int64; lowers `left`, (C,), and redistributes when a class runs out."""
    drawn = np.empty(len(uniforms), dtype=np.int64)
    done = 0
    while done < len(uniforms):
        block = _classes_at(_renormalise(prior, left > 0), uniforms[done:])
        emptied = np.flatnonzero((left > 0) & (np.bincount(block, minlength=len(left)) >= left))
        # Up to and including the draw that first empties a class, the probabilities were right.
        ends = [np.flatnonzero(block == c)[left[c] - 1] + 1 for c in emptied]
        block = block[: min(ends, default=len(block))]
        left -= np.bincount(block, minlength=len(left))
        drawn[done : done + len(block)] = block
        done += len(block)
    return drawn


def _draw(groups: list[Ints], prior: Floats, n: int, rng: np.random.Generator) -> Ints:
    sizes = np.array([len(group) for group in groups])
    drawn = _classes_at(_renormalise(prior, sizes > 0), rng.random(n))
    within = (rng.random(n) * sizes[drawn]).astype(np.int64)
    return np.array([groups[c][i] for c, i in zip(drawn, within, strict=True)], dtype=np.int64)


def _renormalise(prior: Floats, present: npt.NDArray[np.bool_]) -> Floats:
    weights = prior if present.all() else np.where(present, prior + _FLOOR, 0.0)
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def _classes_at(probabilities: Floats, uniforms: Floats) -> Ints:
    edges = np.cumsum(probabilities)
    # Rounding may leave the last edge below 1; cut at the last class that can be drawn.
    last = int(np.flatnonzero(probabilities)[-1])
    return np.minimum(np.searchsorted(edges, uniforms, side="right"), last).astype(np.int64)


Shards = Mapping[tuple[Pool, str], Iterable[Shard]]
"""(pool, language) -> what each client holds, by index; may be read once, as populations can be large."""


def first_clients(source: Source, shards: Shards, clients: int) -> tuple[Source, Shards]:
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


def reference_unseen_partition(
    part: LanguagePool, language: str, seen: Iterator[Shard], clients: int
) -> Iterator[Shard]:
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


GroupOf = Callable[[str, Sequence[Example]], str]
"""Group of a client of this name with these examples."""


def natural_clients(
    clients: Mapping[str, Sequence[LabelledSplit]], group_of: GroupOf, cfg: TaskConfig, seed: int
) -> list[NaturalClient]:
    """One `NaturalClient` per client, in the order given.

    Train and test are the data's own where it says so, in its order; else a client's examples are shuffled by
    (seed, client) and ``task.test_fraction`` of them, rounded up, are test. ``task.max_examples`` keeps the first
    of them after shuffling. A test example that some client trains on is dropped under ``task.drop_duplicates``.

    Args:
        clients: name -> its examples.
        group_of: the group (language) of each client.
        cfg: `unseen`, `test_fraction`, `max_examples` and `drop_duplicates` are used.
        seed: run seed.

    Raises:
        DataError: clients have too few examples (names them), or an unseen client does not exist.
    """
    unseen = list(map(id_part, cfg.unseen))
    check_unseen(unseen, clients)
    if few := [f"{name!r} has {len(held)}" for name, held in clients.items() if len(held) < MIN_EXAMPLES]:
        alike = [f". Names that differ only in case, blanks or Unicode form: {names}" for names in look_alikes(clients)]
        raise DataError(
            f"{len(few)} of {len(clients)} clients with too few usable examples: client {listed(few)}; at least "
            f"{MIN_EXAMPLES} are needed, {MIN_TRAIN} to train on and {MIN_TEST} to be judged by{''.join(alike[:3])}"
        )
    parts = {name: _train_and_test(name, held, cfg, seed) for name, held in clients.items()}
    if cfg.drop_duplicates:
        trained = {e.normal for train, _ in parts.values() for e in train}
        parts = {name: (train, [e for e in test if e.normal not in trained]) for name, (train, test) in parts.items()}
    found = []
    for name, (train, test) in parts.items():
        pool: Pool = "unseen" if name in unseen else "seen"
        found.append(NaturalClient(name, pool, group_of(name, [*train, *test]), tuple(train), tuple(test)))
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


def _train_and_test(
    name: str, held: Sequence[LabelledSplit], cfg: TaskConfig, seed: int
) -> tuple[list[Example], list[Example]]:
    shuffled = [held[i] for i in numpy_rng(seed, "client examples", name).permutation(len(held))]
    if held[0].split is None:
        kept = [h.example for h in shuffled[: cfg.max_examples]]
        n = held_out(len(kept), cfg.test_fraction)
        return kept[n:], kept[:n]
    limit = cfg.max_examples or len(held)
    train, test = (
        [h.example for h in (shuffled if limit < len(held) else held) if h.split == split] for split in SPLITS
    )
    n = min(len(test), held_out(limit, len(test) / len(held))) if limit < len(held) else len(test)
    return train[: limit - n], test[:n]
