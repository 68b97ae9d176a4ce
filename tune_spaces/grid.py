"""A published search (a method, the values that were tried) and the objective that decides it.

An objective is one number from the committed metrics of a trial's personalised clients.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import pandas as pd

from fedtailor.core.errors import ConfigError, DataError, did_you_mean
from fedtailor.report.measures import SHARES
from fedtailor.report.scores import averages, checked

Row = TypeVar("Row")
Value = int | float
Space = Mapping[str, tuple[Value, ...]]
"""Dotted key to the values that were tried; the trials are all combinations, the last key fastest."""


@dataclass(frozen=True)
class Grid:
    """One published search.

    Args:
        method: row of the METHODS table; the trials run it alone.
        space: values of every key, all in the method's own section.
        objective: row of `tune_spaces.grid.OBJECTIVES` that decides unless another is named.
        source: what the paper says about the search, in one line, with the place.
    """

    method: str
    space: Space
    objective: str
    source: str


def assignments(values: Mapping[str, Value]) -> str:
    """The searched values of a trial for people.

    >>> assignments({"lora.lr": 1e-5, "lora.epochs": 2})
    'lora.lr=1e-05, lora.epochs=2'
    """
    return ", ".join(f"{key}={value:g}" for key, value in values.items())


def combinations(space: Space) -> list[dict[str, Value]]:
    """All trials, in a fixed order that numbers them.

    >>> combinations({"a": (1, 2), "b": (3, 4)})[1]
    {'a': 1, 'b': 4}
    """
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def look_up(what: str, name: str, table: Mapping[str, Row]) -> Row:
    """The row of a table.

    Args:
        what: begins the message: ``unknown sweep``.
        name: of the row.
        table: `tune_spaces.grids` or `OBJECTIVES`.

    Raises:
        ConfigError: there is none; names the nearest and all that exist.
    """
    if name not in table:
        raise ConfigError(f"{what} '{name}'{did_you_mean(name, table)} (known: {', '.join(table)})")
    return table[name]


@dataclass(frozen=True)
class Objective:
    """Which rows are averaged, and which way is better.

    Args:
        pool: clients that are personalised and scored.
        metric: name of a metric of the personalising stage.
        mode: ``max`` or ``min``.
        description: what it is, for tables and figures.
    """

    pool: Literal["seen", "unseen"]
    metric: str
    mode: Literal["max", "min"]
    description: str

    @property
    def on_train(self) -> bool:
        """Whether clients must be scored on their train split."""
        return self.metric.startswith("train_")

    @property
    def share(self) -> bool:
        """Whether values are shares between 0 and 1."""
        return self.metric.removeprefix("train_") in SHARES

    def better(self, value: float) -> float:
        """The value turned so that larger is better."""
        return value if self.mode == "max" else -value

    def shown(self, value: float, unit: bool = False) -> str:
        """The value for people: shares in percent.

        >>> OBJECTIVES["seen_accuracy"].shown(0.61254, unit=True), OBJECTIVES["seen_loss"].shown(1.5, unit=True)
        ('61.25 %', '1.5000')
        """
        return f"{100 * value:.2f}{' %' * unit}" if self.share else f"{value:.4f}"


OBJECTIVES: Final[Mapping[str, Objective]] = {
    "train_accuracy": Objective("seen", "train_accuracy", "max", "accuracy on the train texts of seen clients"),
    "train_loss": Objective("seen", "train_loss_after", "min", "loss on the train texts of seen clients"),
    "seen_accuracy": Objective("seen", "accuracy", "max", "test accuracy of seen clients"),
    "seen_loss": Objective("seen", "loss", "min", "test loss of seen clients"),
    "seen_f1": Objective("seen", "f1", "max", "F1 of the spans that seen clients' models mark"),
    "seen_mcc": Objective("seen", "mcc", "max", "Matthews correlation on the test texts of seen clients"),
    "seen_rougeL": Objective("seen", "rougeL", "max", "ROUGE-L of the answers of seen clients"),
    "unseen_accuracy": Objective("unseen", "accuracy", "max", "test accuracy of unseen clients"),
    "unseen_loss": Objective("unseen", "loss", "min", "test loss of unseen clients"),
    "unseen_rougeL": Objective("unseen", "rougeL", "max", "ROUGE-L of the answers of unseen clients"),
}


def for_task(name: str, kind: str) -> str:
    """What a grid's objective becomes for a task that asks for text or spans: train questions are not answered.

    >>> for_task("train_accuracy", "generation"), for_task("train_accuracy", "classification")
    ('train_loss', 'train_accuracy')
    """
    return "train_loss" if kind in ("generation", "extraction") and name == "train_accuracy" else name


def score(metrics: pd.DataFrame, method: str, judged: Objective) -> float:
    """The objective of one method: pooled per language, then the mean over languages, budgets and seeds.

    Args:
        metrics: rows of METRIC_COLUMNS; those of the personalising stage are read.
        method: row of the METHODS table.
        judged: which rows.

    Raises:
        DataError: no row of that kind.
    """
    frame = checked(metrics)
    wanted = (frame["stage"] == "personalise") & (frame["method"] == method) & (frame["pool"] == judged.pool)
    rows = frame[wanted & (frame["metric"] == judged.metric) & (frame["weight"] > 0)]
    if rows.empty:
        raise DataError(f"no {judged.pool} client of '{method}' has the metric '{judged.metric}'")
    return float(averages(rows)["value"].mean())
