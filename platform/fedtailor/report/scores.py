"""From metric rows to the numbers of a table: pooled languages, mean and SD over seeds, wins.

A language's score is pooled, sum(value * n) / sum(n) over its clients (accuracy: correct answers over examples), once
per seed; mean and sample SD are over seeds (one seed: no SD). A client of a generation task has a row for each language
of its examples. The average weighs languages equally. All sums run in sorted order, so the order of the rows does not
change a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from fedtailor.core.errors import DataError
from fedtailor.core.messages import METRIC_COLUMNS
from fedtailor.report import names
from fedtailor.report.measures import (
    ACCURACY,
    BESIDE,
    CONFUSION,
    LOSS,
    POOLED_MCC,
    SCORES,
    SHARES,
    Measure,
    out_of_range,
    pooled_matthews,
)

AVERAGE = "average"
REFERENCE = "base"

RESULT_COLUMNS = (
    "pool", "language", "method", "budget", "metric", "mean", "sd", "n_clients", "n_examples", "n_seeds",
)  # fmt: skip

TIE_RULE = (
    "A win is a language where the method's mean over seeds is the highest of all methods shown at that "
    "budget (base and majority compete); equal means (to 1e-9) count for each tied method."
)

_GROUP = ["pool", "language", "method", "budget", "metric", "seed"]
_TIE = 1e-9


@dataclass(frozen=True)
class Cell:
    """Mean over seeds as a fraction, sample SD (None with one seed), and whether no method is better."""

    mean: float
    sd: float | None
    best: bool = False


@dataclass(frozen=True)
class Block:
    """One pool at one budget: what one block of the paper's table shows.

    Args:
        budget: r, or None where no method of the run has budgets.
        cells: (language, method) to cell; absent pairs were not measured.
        loss: method to the mean over languages of the loss.
        without_budget: methods that are the same in every block.
        measure: what the cells are.
    """

    pool: str
    budget: int | None
    methods: tuple[str, ...]
    languages: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    average: Mapping[str, Cell]
    wins: Mapping[str, int]
    n_clients: int
    n_examples: float
    seeds: tuple[int, ...]
    loss: Mapping[str, Cell] = field(default_factory=dict)
    without_budget: frozenset[str] = frozenset()
    measure: Measure = ACCURACY

    def cell(self, language: str, method: str) -> Cell | None:
        """Of a language, or of `AVERAGE`; None where nothing was measured."""
        return self.average.get(method) if language == AVERAGE else self.cells.get((language, method))


def primary(rows: pd.DataFrame) -> Measure:
    """The measure of a run: the first of `names.BESIDE` that it has rows of; accuracy for a run without scores.

    Args:
        rows: metric rows; those of the personalising stage are looked at.
    """
    scored = rows[rows["stage"] == "personalise"]
    found = set(scored["metric"])
    measure = next((SHARES[name] for name in BESIDE if name in found), ACCURACY)
    return replace(measure, group=_group(set(scored.loc[scored["metric"] == measure.name, "language"])))


def answer_measures(rows: pd.DataFrame) -> tuple[Measure, ...]:
    """The measures that a run shows beside each other, primary one included; empty where accuracy is all there is."""
    main = primary(rows)
    found = set(rows.loc[rows["stage"] == "personalise", "metric"])
    return tuple(replace(measure, group=main.group) for measure in BESIDE[main.name] if measure.name in found)


def _group(codes: set[str]) -> str:
    """``language`` where Unicode CLDR knows every code."""
    return "language" if all(names.language_name(code) != code for code in codes) else "group"


def checked(metrics: pd.DataFrame) -> pd.DataFrame:
    """The metric rows, sorted by all coordinates.

    Raises:
        DataError: a column is missing, a coordinate is measured twice, or a share is outside [0, 1].
    """
    missing = [name for name in METRIC_COLUMNS if name not in metrics.columns]
    if missing:
        raise DataError(f"metrics lack the columns {missing} (needed: {', '.join(METRIC_COLUMNS)})")
    texts = dict.fromkeys(("stage", "method", "pool", "language", "client", "module", "metric"), "str")
    frame = metrics[list(METRIC_COLUMNS)].astype({**texts, "seed": int, "round": int, "budget": int})
    frame = frame.astype({"value": float, "weight": float})
    keys = [name for name in METRIC_COLUMNS if name not in ("value", "weight")]
    frame = frame.sort_values([*keys, "value", "weight"], ignore_index=True)
    scored = frame[(frame["stage"] == "personalise") & frame["metric"].isin(SCORES)]
    twice = scored[scored.duplicated([*_GROUP, "client"])]
    if len(twice):
        row = twice.iloc[0]
        raise DataError(
            f"client {row.client}, {row.method}, budget {row.budget}, seed {row.seed}: {row.metric} is given twice"
        )
    if len(wrong := scored[out_of_range(scored)]):
        row, ends = wrong.iloc[0], SHARES[wrong.iloc[0].metric].ends
        raise DataError(
            f"client {row.client}, {row.method}, budget {row.budget}: {row.metric} {row.value} is not in {ends}"
        )
    return frame


def scored_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of `checked` that score a personalised client on at least one test example.

    Cells of confusion matrices stand for the measure that is counted from them.
    """
    scored = frame["metric"].isin([*SCORES, CONFUSION]) & (frame["stage"] == "personalise") & (frame["weight"] > 0)
    return frame[scored].replace({"metric": {CONFUSION: POOLED_MCC.name}})


def by_language(scored: pd.DataFrame) -> pd.DataFrame:
    """One row per (pool, language, method, budget, metric, seed).

    Columns: ``value`` pooled over clients, ``n_clients``, ``n_examples``.
    """
    cells = scored["metric"] == POOLED_MCC.name
    each = scored[~cells].assign(examples=scored["weight"])
    once = each["metric"].isin([name for name, measure in SHARES.items() if measure.per_client])
    each["weight"] = each["weight"].where(~once, 1.0)
    table = pooled(each, _GROUP, n_clients=("client", "nunique"), n_examples=("examples", "sum")).drop(columns="weight")
    return pd.concat([table, pooled_matthews(scored[cells], _GROUP)], ignore_index=True) if cells.any() else table


def pooled(rows: pd.DataFrame, keys: Sequence[str], **more: Any) -> pd.DataFrame:
    """A row per ``keys``: ``value`` weighted by ``weight``, and the sum of the weights.

    Args:
        rows: with both columns.
        keys: what rows that are brought together have in common.
        more: further columns, as `pandas`' ``agg`` takes them.
    """
    rows = rows.assign(total=rows["value"] * rows["weight"])
    table = rows.groupby(list(keys), as_index=False).agg(total=("total", "sum"), weight=("weight", "sum"), **more)
    means: pd.DataFrame = table.assign(value=table["total"] / table["weight"]).drop(columns="total")
    return means


def averages(scored: pd.DataFrame) -> pd.DataFrame:
    """As `by_language`, language `AVERAGE`: the unweighted mean over languages. A client counts once."""
    keys = [name for name in _GROUP if name != "language"]
    table = (
        by_language(scored).groupby(keys, as_index=False).agg(value=("value", "mean"), n_examples=("n_examples", "sum"))
    )
    people = scored.groupby(keys)["client"].nunique().rename("n_clients").reset_index()
    return table.merge(people, on=keys).assign(language=AVERAGE)


def results_table(scored: pd.DataFrame) -> pd.DataFrame:
    """``results.csv``: RESULT_COLUMNS, fractions (loss: nats), NaN SD with one seed.

    Methods without budgets have budget -1. ``n_clients`` and ``n_examples`` are per seed (their mean, should
    seeds differ).
    """
    pooled = by_language(scored)
    table = pd.concat([pooled, averages(scored)], ignore_index=True)
    table = table.groupby([name for name in _GROUP if name != "seed"], as_index=False).agg(
        mean=("value", "mean"),
        sd=("value", "std"),
        n_clients=("n_clients", "mean"),
        n_examples=("n_examples", "mean"),
        n_seeds=("seed", "nunique"),
    )
    table = in_table_order(table, ["pool", "metric", "method", "budget", "language"])
    return table[list(RESULT_COLUMNS)]


def in_table_order(table: pd.DataFrame, by: Sequence[str], runs: Sequence[str] = ()) -> pd.DataFrame:
    """Rows sorted by some columns: pools, methods and runs in their order, `AVERAGE` after the languages.

    Args:
        table: rows.
        by: columns; what has no order of its own ascends.
        runs: order of column ``run``.
    """
    orders: dict[Hashable, Callable[[Iterable[str]], Sequence[str]]] = {
        "pool": names.in_pool_order,
        "method": names.in_method_order,
        "run": lambda _: runs,
        "language": lambda codes: sorted(set(codes), key=lambda code: (code == AVERAGE, code)),
    }
    return table.sort_values(
        list(by), key=lambda c: c.map(orders[c.name](c).index) if c.name in orders else c, ignore_index=True
    )


def blocks(scored: pd.DataFrame, measure: Measure | None = None) -> list[Block]:
    """Every (pool, budget) in order; methods without budgets appear in each block.

    Args:
        scored: rows of `scored_rows`.
        measure: what the cells are; default: the run's primary one.
    """
    measure, table = measure or primary(scored), results_table(scored)
    values = table[table["metric"] == measure.name]
    budgets = sorted(set(values["budget"]) - {-1}) or [-1]
    of_pool = {str(pool): rows for pool, rows in scored.groupby("pool")}
    return [
        _block(of_pool[pool], budget, table[table["pool"] == pool], measure)
        for pool in names.in_pool_order(values["pool"])
        for budget in budgets
        if ((values["pool"] == pool) & values["budget"].isin([budget, -1])).any()
    ]


def _block(scored: pd.DataFrame, budget: int, table: pd.DataFrame, measure: Measure) -> Block:
    pool = str(scored["pool"].iloc[0])
    here = table[table["budget"].isin([budget, -1])]
    # A method with budgets and a stray row without is shown at its budget.
    here = here.sort_values("budget", ascending=False, kind="stable").drop_duplicates(["language", "method", "metric"])
    values = here[here["metric"] == measure.name]
    methods = names.in_method_order(values["method"])
    languages = tuple(sorted(set(values["language"]) - {AVERAGE}))
    cells: dict[tuple[str, str], Cell] = {}
    for name in (*languages, AVERAGE):
        marked = _mark_best(_cells(values, name), measure)
        cells |= {(name, method): cell for method, cell in marked.items()}
    of_language = {key: cell for key, cell in cells.items() if key[0] != AVERAGE}
    total = values[values["language"] == AVERAGE]
    at = dict(zip(values["method"], values["budget"], strict=True))
    return Block(
        pool=pool,
        budget=None if budget == -1 else budget,
        methods=methods,
        languages=languages,
        cells=of_language,
        average={method: cells[AVERAGE, method] for method in methods},
        wins={m: sum(cell.best for (_, method), cell in of_language.items() if method == m) for m in methods},
        n_clients=scored["client"].nunique(),
        n_examples=float(total["n_examples"].max()),
        seeds=tuple(sorted({int(seed) for seed in scored["seed"]})),
        loss=_cells(here[here["metric"] == LOSS], AVERAGE),
        without_budget=frozenset(method for method in methods if at[method] == -1),
        measure=measure,
    )


def _cells(table: pd.DataFrame, language: str) -> dict[str, Cell]:
    rows = table[table["language"] == language]
    return {
        method: Cell(float(mean), None if np.isnan(sd) else float(sd))
        for method, mean, sd in zip(rows["method"], rows["mean"], rows["sd"], strict=True)
    }


def _mark_best(cells: dict[str, Cell], measure: Measure) -> dict[str, Cell]:
    sign = -1 if measure.least_is_best else 1
    top = max((sign * cell.mean for cell in cells.values()), default=np.nan)
    # Where all score zero there is no best: nobody has learned anything yet.
    some = measure.least_is_best or top > 0
    return {m: Cell(cell.mean, cell.sd, bool(some and sign * cell.mean >= top - _TIE)) for m, cell in cells.items()}


def client_scores(rows: pd.DataFrame) -> pd.DataFrame:
    """Score per (pool, method, budget, seed, client), ``value``, pooled over the client's languages.

    Args:
        rows: of `scored_rows`, of one metric.
    """
    return pooled(rows, ["pool", "method", "budget", "seed", "client"])
