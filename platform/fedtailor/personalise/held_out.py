"""What a new client learns from and what it is scored on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.core.seeding import numpy_rng
from fedtailor.personalise.data import Columns, Rows, Table, instructed, labelled, read_tables
from fedtailor.tasks.config import AUTO

TEST_FRACTION = 0.2
"""Share of the data that is held out where neither they nor the user say which."""


def read_data(
    data: str,
    test: str | None,
    wanted: Columns,
    classes: Sequence[str],
    fraction: float | None,
    limit: int | None,
    seed: int,
    split_column: str | None = AUTO,
) -> tuple[Rows, Rows, str]:
    """Rows to learn from, rows to score on, and where these come from.

    Args:
        data: file, folder or hub id, see `read_tables`.
        test: the same, to score on; None: what ``data`` says is for test, else a share of it.
        wanted: columns named by the user.
        classes: class names of the base model in the order of their ids; none: it answers.
        fraction: that share; None: `TEST_FRACTION`.
        limit: most rows to learn from and hold out of ``data``; None: all.
        seed: run seed.
        split_column: see `read_tables`.

    Raises:
        ConfigError: columns are named that instructions do not have, or a share of data that say themselves what is
            for test.
        DataError: see `read_tables`, `labelled`, `instructed` and `hold_out`; one class alone; single texts to learn
            from and pairs to score on, or the other way round.
    """
    if not classes and wanted != Columns():
        raise ConfigError("--text, --pair and --label are for runs that classify; instructions have their usual names")

    def made(table: Table) -> Rows:
        return labelled(table, wanted, classes) if classes else instructed(table)

    table, held = read_tables(data, "--data", "train", split_column)
    if held is not None and fraction is not None:
        raise ConfigError(
            f"--test-fraction {fraction:g}: {table.name} says itself which rows are for test; leave it out"
        )
    train = made(table)
    if limit is not None:
        train = limited(train, limit, seed)
    if classes:
        refuse_single_class(train, classes)
    if test is not None:
        rest, own = read_tables(test, "--test", "test", split_column)
        held_out, how = made(own or rest), "given"
    elif held is not None:
        held_out, how = made(held), "by the data"
    else:
        return *hold_out(train, TEST_FRACTION if fraction is None else fraction, seed), "held out of the data"
    columns, others = train.columns, held_out.columns
    if columns and others and (columns.pair is None) != (others.pair is None):
        paired, pairs, single = (train, columns, held_out) if others.pair is None else (held_out, others, train)
        raise DataError(
            f"{paired.name} has pairs of texts ({pairs.text}, {pairs.pair}), {single.name} has single texts; name both "
            "columns with --text and --pair"
        )
    return train, held_out, how


def limited(data: Rows, limit: int, seed: int) -> Rows:
    """At most ``limit`` rows: a seeded draw, in the order of the file."""
    if len(data) <= limit:
        return data
    return data.take(sorted(numpy_rng(seed, "newcomer", "limit").permutation(len(data))[:limit]))


def hold_out(data: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Splits into train and held-out rows, each class in proportion; no class loses its last train row.

    Rows with the same text stay on one side.

    Args:
        data: all rows.
        fraction: share to hold out, between 0 and 1.
        seed: run seed.

    Raises:
        DataError: so few rows that none can be held out.
    """
    groups, labels = dict[str, list[int]](), data.labels
    for i, row in enumerate(data.examples):
        groups.setdefault(row.normal, []).append(i)
    draws = numpy_rng(seed, "newcomer", "held-out").random(len(groups))
    drawn = sorted(zip(groups.values(), draws, strict=True), key=lambda group: (labels[group[0][0]], group[1]))
    left, owed, out = Counter(labels), 0.0, set[int]()
    for rows, _ in drawn:
        owed += fraction * len(rows)
        used = Counter(labels[i] for i in rows)
        if owed >= len(rows) / 2 and all(left[label] > count for label, count in used.items()):
            out.update(rows)
            owed -= len(rows)
            left -= used
    if not out:
        raise DataError(
            f"{data.name}: {len(data)} usable rows are too few to hold out {fraction:g} of them; give more rows, a "
            "larger --test-fraction, or a file of held-out rows with --test"
        )
    return data.take(i for i in range(len(data)) if i not in out), data.take(sorted(out))


def refuse_single_class(data: Rows, allowed: Sequence[str]) -> None:
    """Nothing can be learned from one class.

    Raises:
        DataError: fewer than two classes; names the one there is.
    """
    present = sorted(set(data.labels))
    if len(present) < 2:
        raise DataError(
            f"{data.name}: all {len(data)} usable rows are of one class ({allowed[present[0]]}); "
            "personalising needs at least two classes"
        )


def shared_texts(train: Rows, test: Rows) -> int:
    """Held-out rows whose text is trained on too: their score flatters."""
    trained = {row.normal for row in train.examples}
    return sum(row.normal in trained for row in test.examples)
