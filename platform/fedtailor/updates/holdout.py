"""A client's training texts split once more: some are held out to validate on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedtailor.core.batches import Examples, IntArray
from fedtailor.core.context import ClientContext, Lane
from fedtailor.core.seeding import numpy_rng


@dataclass(frozen=True)
class Rows:
    """Some texts of a client, in their original order; arrays as in `Examples`."""

    input_ids: IntArray
    lengths: IntArray
    labels: IntArray
    first: IntArray | None
    prompt: IntArray | None = None

    @classmethod
    def of(cls, examples: Examples, rows: IntArray) -> Rows:
        """The given rows."""
        first, prompt = (None if part is None else part[rows] for part in (examples.first, examples.prompt))
        return cls(examples.input_ids[rows], examples.lengths[rows], examples.labels[rows], first, prompt)


def held_out(size: int, share: float) -> int:
    """Texts to hold out: the share, rounded half up, but at least one on each side.

    A larger client never keeps fewer training texts than a smaller one, so the order of lanes survives the split.

    >>> [held_out(n, 0.2) for n in (2, 4, 5, 12, 13, 100)]
    [1, 1, 1, 2, 3, 20]
    """
    return min(max(1, int(share * size + 0.5)), size - 1)


def split(lane: Lane, seed: int, share: float) -> tuple[Lane, Rows]:
    """A lane with its remaining training texts, and those held out.

    The split is named by (seed, client) alone: every round, budget and method that asks sees the same one. A client
    with a single text has it on both sides.
    """
    order = numpy_rng(seed, lane.client.id, "validation").permutation(lane.size)
    cut = held_out(lane.size, share)
    validation, train = (order[:cut], order[cut:]) if cut else (order, order)
    return replace(lane, train=Rows.of(lane.train, np.sort(train))), Rows.of(lane.train, np.sort(validation))


def split_lanes(ctx: ClientContext, share: float) -> tuple[ClientContext, list[Rows]]:
    """All lanes split; see `split`."""
    pairs = [split(lane, ctx.seed, share) for lane in ctx.lanes]
    return replace(ctx, lanes=tuple(lane for lane, _ in pairs)), [rows for _, rows in pairs]
