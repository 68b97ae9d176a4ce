"""Which of a user's rows are trained on and which are held out to score the result."""

from __future__ import annotations

from collections.abc import Sequence

from fedtailor.core.errors import DataError
from fedtailor.core.seeding import numpy_rng
from fedtailor.runs.newcomer_data import Labelled


def limited(data: Labelled, limit: int, seed: int) -> Labelled:
    """At most ``limit`` rows: a seeded draw, in the order of the file."""
    if len(data) <= limit:
        return data
    return data.take(sorted(numpy_rng(seed, "newcomer", "limit").permutation(len(data))[:limit]))


def hold_out(data: Labelled, fraction: float, seed: int) -> tuple[Labelled, Labelled]:
    """Splits into train and held-out rows, each class in proportion; no class loses its last train row.

    Rows with the same text stay on one side.

    Args:
        data: all rows.
        fraction: share to hold out, between 0 and 1.
        seed: run seed.

    Raises:
        DataError: so few rows that none can be held out.
    """
    groups: dict[str, list[int]] = {}
    for i, key in enumerate(data.normalised()):
        groups.setdefault(key, []).append(i)
    draws = numpy_rng(seed, "newcomer", "held-out").random(len(groups))
    members = list(groups.values())
    order = sorted(range(len(members)), key=lambda g: (data.labels[members[g][0]], draws[g]))
    left, owed, out = data.counts(max(data.labels) + 1), 0.0, set[int]()
    for group in order:
        rows = members[group]
        owed += fraction * len(rows)
        used = {label: sum(data.labels[i] == label for i in rows) for label in {data.labels[i] for i in rows}}
        if owed >= len(rows) / 2 and all(left[label] > count for label, count in used.items()):
            out.update(rows)
            owed -= len(rows)
            for label, count in used.items():
                left[label] -= count
    if not out:
        raise DataError(
            f"{data.name}: {len(data)} usable rows are too few to hold out {fraction:g} of them; give more rows, a "
            "larger --test-fraction, or a file of held-out rows with --test"
        )
    return data.take(i for i in range(len(data)) if i not in out), data.take(sorted(out))


def refuse_single_class(data: Labelled, allowed: Sequence[str]) -> None:
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


def shared_texts(train: Labelled, test: Labelled) -> int:
    """Held-out rows whose text is trained on too: their score flatters."""
    trained = set(train.normalised())
    return sum(key in trained for key in test.normalised())
