"""A share of the texts sorted by label, the rest IID: the label skew of PF2LoRA's experiments on GLUE.

Paper: Hao, Wu, Payani, Lee, Liu (arXiv 2503.03920) section 6.1, after Karimireddy et al. 2020. Per language and pool:
of the shuffled train texts a share s is sorted by label and cut into one contiguous block per client; the others are
dealt out IID. Clients' sizes differ by at most 1.
The paper's text says the opposite: 100 s % of a client's samples are IID and 100 (1 - s) % sorted by label. Its tables
call s the heterogeneity level, and what has nothing personal loses as s grows: this reading is theirs.
Deviation: the paper sorts and cuts test texts like train texts. The borders of the blocks then differ (of the sorted
texts of SST-2's third client 54 % in train and 93 % in test are negative), so by default test texts mirror train texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from fedtailor.core.errors import DataError
from fedtailor.core.seeding import numpy_rng
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.partition import MIN_TEST, MIN_TRAIN, Shard, client_id
from fedtailor.tasks.source import SPLITS, LanguagePool, Pool, Split

Ints = npt.NDArray[np.int64]


def sorted_partition(
    part: LanguagePool, pool: Pool, language: str, cfg: TaskConfig, labels: Sequence[str], seed: int,
    topics: bool = False,
) -> Iterator[Shard]:  # fmt: skip
    """Deals every train text to exactly one client, and every test text of a class that some client trains on.

    Args:
        part: the texts.
        pool: which pool they are.
        language: their language or group.
        cfg: `sorted_share`, `test_split` and `clients_per_language` are used.
        labels: class names, for messages.
        seed: run seed.
        topics: the labels are topics, of which a client may have train texts and no test text.

    Raises:
        DataError: a class has fewer test texts than there are clients, so that they cannot mirror the train texts; or
            a client would have fewer than 2 train texts or no test text; names it.
    """
    n, place = cfg.clients_per_language, (pool, language)
    assert cfg.sorted_share is not None, "asked for by the configuration"
    classes = {split: np.array([e.label for e in part.split(split)], dtype=np.int64) for split in SPLITS}
    train = _blocks(classes["train"], cfg.sorted_share, n, seed, (*place, "train"))
    if cfg.test_split == "mirror":
        if not topics:
            _check_mirror(classes, labels, n, place)
        counts = np.stack([np.bincount(classes["train"][rows], minlength=len(labels)) for rows in train])
        test = mirrored(classes["test"], counts, seed, place)
    else:
        test = _blocks(classes["test"], cfg.sorted_share, n, seed, (*place, "test"))
    for index, shard in enumerate(map(Shard, train, test)):
        if len(shard.train) < MIN_TRAIN or len(shard.test) < MIN_TEST:
            raise DataError(
                f"client {client_id(pool, language, index, n)} would have {len(shard.train)} train and "
                f"{len(shard.test)} test texts, and needs {MIN_TRAIN} and {MIN_TEST}: the {pool} pool of {language!r} "
                f"has {len(part.train)} and {len(part.test)} for {n} clients (task.clients_per_language)"
            )
        yield shard


def skew_sentence(cfg: TaskConfig) -> str:
    """What a caption says of clients made by `sorted_partition`; empty for others.

    >>> skew_sentence(TaskConfig(sorted_share=0.9))[:67]
    'Of the train texts a share s = 0.9 is sorted by label and cut into '
    """
    if cfg.sorted_share is None:
        return ""
    by = "title" if cfg.name == "squad" else "label"
    tests = "mirror each client's train texts" if cfg.test_split == "mirror" else "are sorted and cut likewise"
    return (
        f"Of the train texts a share s = {cfg.sorted_share:g} is sorted by {by} and cut into contiguous blocks, the "
        "rest is dealt out IID (as PF2LoRA's tables read; the paper's text calls s the IID share); test texts "
        f"{tests}."
    )


def _blocks(labels: Ints, share: float, clients: int, seed: int, place: tuple[str, ...]) -> list[Ints]:
    """Rows of each client, (n,) int64: its block of the sorted ones, then its IID ones."""
    rows = numpy_rng(seed, "sorted share", *place).permutation(len(labels))
    middle = round(share * len(rows))
    ordered = rows[:middle][np.argsort(labels[rows[:middle]], kind="stable")]
    blocks = np.array_split(ordered, clients)
    sizes = [len(part) for part in np.array_split(rows, clients)]
    rest = np.cumsum([size - len(block) for size, block in zip(sizes, blocks, strict=True)])[:-1]
    return [np.concatenate(both) for both in zip(blocks, np.split(rows[middle:], rest), strict=True)]


def _check_mirror(classes: dict[Split, Ints], labels: Sequence[str], clients: int, place: tuple[str, str]) -> None:
    for number, label in enumerate(labels):
        train, test = (int((classes[split] == number).sum()) for split in SPLITS)
        if train and test < clients:
            raise DataError(
                f"class {label!r} of {place[0]}/{place[1]} has {test} test texts for {clients} clients, so they cannot "
                "mirror the train texts: use fewer clients (task.clients_per_language) or task.test_split=blocks"
            )


def mirrored(labels: Ints, counts: Ints, seed: int, place: tuple[str, str]) -> list[Ints]:
    """Rows of each client; a class is dealt in proportion to the clients' train texts of it, by largest remainders.

    Args:
        labels: of the test texts, (N,).
        counts: train texts of each class, (clients, C).
    """
    held: list[list[Ints]] = [[] for _ in counts]
    for number, own in enumerate(counts.T):
        rows = np.flatnonzero(labels == number)
        if not own.sum():
            continue
        rows = numpy_rng(seed, "mirrored test", *place, number).permutation(rows)
        exact = len(rows) * own / own.sum()
        quotas = np.floor(exact).astype(np.int64)
        quotas[np.argsort(quotas - exact, kind="stable")[: len(rows) - quotas.sum()]] += 1
        for mine, more in zip(held, np.split(rows, np.cumsum(quotas)[:-1]), strict=True):
            mine.append(more)
    return [np.concatenate(parts) for parts in held]
