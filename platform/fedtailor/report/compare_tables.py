"""Results of several runs in one table per pool: a row per run and method, a column per budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from fedtailor.report.compare_read import Side
from fedtailor.report.names import in_method_order, in_pool_order
from fedtailor.report.scores import AVERAGE, Cell, results_table

Budget = int | None
"""r, None where no method of any run has budgets."""

COLUMNS = ("pool", "run", "method", "budget", "mean", "sd", "n_clients", "n_examples", "n_seeds")

_TIE = 1e-9


@dataclass(frozen=True)
class Line:
    """One method of one run in one pool.

    Args:
        run: index of the run.
        cells: budget to score, mean over languages, then over seeds; a method without budgets has the same at all.
        flat: the method has no budgets.
        clients: fewest and most clients behind a cell.
        seeds: most seeds behind a cell.
    """

    run: int
    method: str
    cells: Mapping[Budget, Cell]
    flat: bool
    clients: tuple[int, int]
    seeds: int


@dataclass(frozen=True)
class PoolTable:
    """Results in one pool; `Cell.best` is over all its lines."""

    pool: str
    budgets: tuple[Budget, ...]
    lines: tuple[Line, ...]


def pool_tables(sides: Sequence[Side]) -> tuple[PoolTable, ...]:
    """A table per pool, all with the same columns: every budget of any run."""
    table = _averages(sides)
    budgets: tuple[Budget, ...] = tuple(sorted({int(r) for r in table["budget"]} - {-1})) or (None,)
    found = []
    for pool in in_pool_order(table["pool"]):
        here = table[table["pool"] == pool]
        lines = [
            _line(run, method, rows, budgets)
            for run in range(len(sides))
            for method in in_method_order(here.loc[here["run"] == run, "method"])
            if len(rows := here[(here["run"] == run) & (here["method"] == method)])
        ]
        found.append(PoolTable(pool, budgets, _marked(lines, budgets)))
    return tuple(found)


def results_csv(sides: Sequence[Side]) -> pd.DataFrame:
    """``compare.csv``: `COLUMNS`, fractions; budget -1 for methods without, no SD with one seed."""
    table = _averages(sides)
    pools, methods = in_pool_order(table["pool"]), in_method_order(table["method"])
    table = table.assign(p=table["pool"].map(pools.index), m=table["method"].map(methods.index))
    table = table.sort_values(["p", "run", "m", "budget"], ignore_index=True)
    return table.assign(run=[sides[k].run_id for k in table["run"]])[list(COLUMNS)]


def _averages(sides: Sequence[Side]) -> pd.DataFrame:
    """Rows of `results_table` for the mean over languages, with ``run``, the run's index."""
    table = pd.concat([results_table(side.values).assign(run=k) for k, side in enumerate(sides)], ignore_index=True)
    table = table[table["language"] == AVERAGE]
    # As in a report: a method with budgets and a stray row without is taken at its budgets.
    largest = table.groupby(["run", "pool", "method"])["budget"].transform("max")
    return table[(table["budget"] >= 0) | (largest < 0)]


def _line(run: int, method: str, rows: pd.DataFrame, budgets: Sequence[Budget]) -> Line:
    at = {
        int(r): Cell(float(mean), None if np.isnan(sd) else float(sd))
        for r, mean, sd in zip(rows["budget"], rows["mean"], rows["sd"], strict=True)
    }
    flat = -1 in at
    cells: dict[Budget, Cell] = dict.fromkeys(budgets, at[-1]) if flat else {r: at[r] for r in budgets if r in at}
    clients = (round(float(rows["n_clients"].min())), round(float(rows["n_clients"].max())))
    return Line(run, method, cells, flat, clients, int(rows["n_seeds"].max()))


def _marked(lines: Sequence[Line], budgets: Sequence[Budget]) -> tuple[Line, ...]:
    top = {r: max((line.cells[r].mean for line in lines if r in line.cells), default=np.nan) for r in budgets}
    return tuple(
        replace(line, cells={r: replace(c, best=bool(c.mean >= top[r] - _TIE)) for r, c in line.cells.items()})
        for line in lines
    )
