"""Means by group, as sums and counts that can be joined: over the samples of a client, of a language, of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """A mean under way.

    Args:
        total: sum of the values.
        count: how many.
    """

    total: float = 0.0
    count: int = 0

    @property
    def value(self) -> float:
        """The mean; undefined of nothing."""
        return self.total / self.count


Tally = Mapping[str, Mapping[str, Mean]]
"""Group -> metric -> mean under way."""


def init() -> Tally:
    """Nothing counted yet."""
    return {}


def add(tally: Tally, group: str, values: Mapping[str, float]) -> Tally:
    """The tally with one sample more."""
    return merge(tally, {group: {metric: Mean(value, 1) for metric, value in values.items()}})


def merge(left: Tally, right: Tally) -> Tally:
    """Two tallies joined, left first; groups and metrics in the order in which they were first seen."""
    joined = {group: dict(metrics) for group, metrics in left.items()}
    for group, metrics in right.items():
        own = joined.setdefault(group, {})
        for metric, more in metrics.items():
            before = own.get(metric, Mean())
            own[metric] = Mean(before.total + more.total, before.count + more.count)
    return joined


def result(tally: Tally) -> dict[str, dict[str, float]]:
    """Group -> metric -> mean.

    >>> result(add(add(init(), "en", {"rougeL": 0.5}), "en", {"rougeL": 1.0}))
    {'en': {'rougeL': 0.75}}
    """
    return {group: {metric: mean.value for metric, mean in metrics.items()} for group, metrics in tally.items()}
