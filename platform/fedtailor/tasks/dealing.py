"""Rows of several tasks dealt to seen clients: one task for each client, or Dirichlet shares of every task.

Paper: pFedGPT (Shen, Xu, Wang, Li, Pan, EMNLP 2025) section 5.1. *Task-specific*: client k has the train and test rows
of task k alone. *Dirichlet*: of every task the clients have shares drawn from Dir(alpha 1_m), where a client that holds
N / m rows already gets none; the shares are cut off the shuffled rows one after another; all is drawn anew until the
smallest client has `min_size` rows (40 in the code).

Ours, where the paper is silent or its code does not end. Test rows are chosen once, before anything is dealt, and dealt
again in proportion to each client's train rows of a task, so that 8, 20 and 50 clients are judged by the same rows.
`min_size` is a quarter of the mean where that is less than 40 (50 clients of 3,003 rows never have 40 each), and draws
end after `MOST_DRAWS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.core.seeding import numpy_rng
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.partition import MIN_EXAMPLES, MIN_TEST, MIN_TRAIN, Shard, held_out
from fedtailor.tasks.sorted_share import mirrored
from fedtailor.tasks.source import SPLITS, Example, LanguagePool, Pool, Source

Ints = npt.NDArray[np.int64]

MOST_DRAWS: Final = 1000
MIN_SIZE: Final = 40
"""Fewest training rows of a client in the paper's code."""


def check_tasks(cfg: TaskConfig, tasks: Sequence[str]) -> None:
    """Raises ConfigError where every task is to have one client, and there are more or fewer clients than tasks."""
    clients = cfg.clients_per_language
    if cfg.dealing == "task_specific" and clients != len(tasks):
        raise ConfigError(
            f"'task.dealing' = task_specific gives each task a client of its own: {clients} clients are asked for "
            f"('task.clients_per_language') and task '{cfg.title}' has {len(tasks)} tasks ({', '.join(tasks)}); "
            f"allowed: {len(tasks)}, or task.dealing=dirichlet"
        )


def held_out_pool(
    group: str, by_task: Mapping[str, Sequence[Example]], fraction: float, seed: int
) -> dict[Pool, dict[str, LanguagePool]]:
    """One group of seen clients' texts, with so large a share of every task for test, drawn by (seed, group, task).

    A row that occurs more than once is never for test, so that no test row is trained on.

    Raises:
        DataError: a task has fewer rows than a client needs; names it.
    """
    times = Counter(example.normal for examples in by_task.values() for example in examples)
    train: list[Example] = []
    test: list[Example] = []
    for task, examples in by_task.items():
        if len(examples) < MIN_EXAMPLES:
            raise DataError(f"task {task!r} has {len(examples)} rows; {MIN_EXAMPLES} are needed to train and to test")
        shuffled = [examples[i] for i in numpy_rng(seed, "held out", group, task).permutation(len(examples))]
        once = [example for example in shuffled if times[example.normal] == 1]
        tests = once[: min(max(MIN_TEST, round(fraction * len(examples))), len(examples) - MIN_TRAIN)]
        chosen = {example.normal for example in tests}
        test += tests
        train += [example for example in shuffled if example.normal not in chosen]
    return {"seen": {group: LanguagePool(train, test)}}


def deal_tasks(source: Source, cfg: TaskConfig, seed: int) -> tuple[Source, dict[tuple[Pool, str], list[Shard]]]:
    """The clients of a source whose texts are one group, as ``task.dealing`` says.

    Args:
        source: labels are the tasks.
        cfg: `dealing`, `clients_per_language`, `alpha`, `min_size` and `max_examples` are used.
        seed: run seed.

    Returns:
        The source with notes of how it was dealt, and what each client holds.

    Raises:
        DataError: no draw gives every client enough rows; says how many the smallest client had at best.
    """
    ((pool, group, part),) = source.parts()
    labels = {split: np.array([e.label for e in part.split(split)], dtype=np.int64) for split in SPLITS}
    notes: dict[str, int | str] = {}
    if cfg.dealing == "task_specific":
        shards = [Shard(*(np.flatnonzero(labels[s] == k) for s in SPLITS)) for k in range(len(source.labels))]
    else:
        shards, notes = _dirichlet(labels["train"], labels["test"], cfg, group, seed, len(source.labels))
    limited = [
        _limited(shard, cfg.max_examples, numpy_rng(seed, "rows of a client", group, index))
        for index, shard in enumerate(shards)
    ]
    return replace(source, notes={**source.notes, **notes}), {(pool, group): limited}


def _dirichlet(
    train: Ints, test: Ints, cfg: TaskConfig, group: str, seed: int, classes: int
) -> tuple[list[Shard], dict[str, int | str]]:
    clients, mean = cfg.clients_per_language, len(train) / cfg.clients_per_language
    fewest = cfg.min_size or max(MIN_TRAIN, min(MIN_SIZE, int(mean / 4)))
    best = 0
    for draw in range(MOST_DRAWS):
        held = list(_shares(train, clients, cfg.alpha, numpy_rng(seed, "dealing", group, clients, draw)))
        smallest = min(map(len, held))
        best = max(best, smallest)
        if smallest < fewest:
            continue
        counts = np.stack([np.bincount(train[rows], minlength=classes) for rows in held])
        tests = mirrored(test, counts, seed, ("seen", group))
        if min(map(len, tests)) >= MIN_TEST:
            notes: dict[str, int | str] = {"redraws": draw, "min_size": fewest, "smallest_client": smallest}
            return list(map(Shard, held, tests)), notes
    raise DataError(
        f"'task.dealing' = dirichlet: none of {MOST_DRAWS} draws (task.alpha={cfg.alpha:g}) of {len(train)} training "
        f"rows gives each of {clients} clients (task.clients_per_language) the {fewest} of task.min_size and a test "
        f"row; the largest minimum seen is {best}. Use a smaller min_size, fewer clients or a larger alpha"
    )


def _shares(labels: Ints, clients: int, alpha: float, rng: np.random.Generator) -> Iterator[Ints]:
    """Rows of each client, (n,) int64, of one draw."""
    held: list[list[Ints]] = [[] for _ in range(clients)]
    sizes = np.zeros(clients, dtype=np.int64)
    for number in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == number))
        open_to = sizes < len(labels) / clients
        shares = np.where(open_to, rng.dirichlet(np.full(clients, alpha)), 0.0)
        # A tiny alpha may leave all to clients that are full.
        shares = np.cumsum(shares if shares.any() else open_to)
        cuts = (shares / shares[-1] * len(rows)).astype(np.int64)[:-1]
        for client, more in enumerate(np.split(rows, cuts)):
            held[client].append(more)
            sizes[client] += len(more)
    yield from map(np.concatenate, held)


def _limited(shard: Shard, most: int | None, rng: np.random.Generator) -> Shard:
    """A client's rows, shuffled, at most so many in all; the share of test rows stays."""
    train, test = rng.permutation(shard.train), rng.permutation(shard.test)
    total = len(train) + len(test)
    if most is None or total <= most:
        return Shard(train, test)
    tests = min(len(test), held_out(most, len(test) / total))
    return Shard(train[: most - tests], test[:tests])
