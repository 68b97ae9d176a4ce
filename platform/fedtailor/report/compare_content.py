"""Everything that a comparison shows, worked out once for page, text, tables and terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedtailor.report import compare_differences as differing
from fedtailor.report.compare_differences import Differences, Row
from fedtailor.report.compare_pairs import RunPair, compare_pairs
from fedtailor.report.compare_read import Side
from fedtailor.report.compare_tables import Budget, Line, PoolTable, pool_tables
from fedtailor.report.metrics import Measure
from fedtailor.report.names import in_method_order, method_name
from fedtailor.report.scores import Cell
from fedtailor.report.significance import MARKS, interval_text, p_text
from fedtailor.report.wording import ABSENT, percent, points, spread

PairKey = tuple[int, int, str]
"""Run, earlier run, method."""


@dataclass(frozen=True)
class Comparison:
    """What is shown.

    Args:
        sides: the runs, in the order given.
        facts: state and setting of each run.
        changed: configuration keys that differ.
        notes: what makes averages unlike, and why runs have no paired test.
        wandb: sentences on where the runs are on W&B, empty where they are not.
    """

    sides: tuple[Side, ...]
    facts: tuple[Row, ...]
    changed: Differences
    tables: tuple[PoolTable, ...]
    pairs: tuple[RunPair, ...]
    notes: tuple[str, ...]
    wandb: tuple[str, ...] = ()

    @property
    def measure(self) -> Measure:
        """What the runs' clients are scored by."""
        return self.sides[0].measure

    @property
    def table_rule(self) -> str:
        """What the tables of results show."""
        return (
            f"{self.measure.title} in percent, {self.measure.mean}: mean (SD) over seeds; the best of each budget in "
            "bold. Clients and seeds are those behind a row. A method without budgets has the same number at each."
        )

    @property
    def run_ids(self) -> tuple[str, ...]:
        """Names of the runs."""
        return tuple(side.run_id for side in self.sides)

    def grid(self, pool: str) -> dict[PairKey, dict[Budget, RunPair]]:
        """The pairs of a pool: (run, earlier run, method) to the pair at each budget, methods together.

        A method without budgets has its one pair at each.
        """
        (budgets,) = {table.budgets for table in self.tables if table.pool == pool}
        rows: dict[PairKey, dict[Budget, RunPair]] = {}
        for pair in self.pairs:
            if pair.result.pool == pool:
                at = budgets if pair.result.budget is None else (pair.result.budget,)
                rows.setdefault((pair.run, pair.other, pair.result.method), {}).update(dict.fromkeys(at, pair))
        order = in_method_order(key[2] for key in rows)
        return dict(sorted(rows.items(), key=lambda row: (order.index(row[0][2]), row[0][1], row[0][0])))


def work_out(sides: Sequence[Side]) -> Comparison:
    """Compares the runs."""
    tables = pool_tables(sides)
    pairs, reasons = compare_pairs(sides, tables)
    return Comparison(
        tuple(sides), differing.facts(sides), differing.differences(sides), tables, pairs,
        (*differing.notes(sides), *reasons),
    )  # fmt: skip


def cell_text(cell: Cell | None) -> tuple[str, str]:
    """Mean and ``(SD)`` as printed; no SD with one seed."""
    if cell is None:
        return ABSENT, ""
    return percent(cell.mean), "" if cell.sd is None else f"({percent(cell.sd)})"


def behind(line: Line) -> str:
    """``48 × 3``: clients and seeds behind a line."""
    return f"{spread(line.clients)} × {line.seeds}"


def pair_text(pair: RunPair | None) -> tuple[str, str, str]:
    """``+1.20 ▲``, ``[+0.40, +2.06]`` and ``p 0.003``; or that there is nothing to test."""
    if pair is None:
        return ABSENT, "", ""
    if pair.same:
        return "same stages", "", ""
    found = pair.result
    told = f"{points(found.difference)} {MARKS[found.verdict]}".strip()
    return (told, ABSENT, "") if found.p_holm is None else (told, interval_text(found), f"p {p_text(found.p_holm)}")


def pair_title(key: PairKey, run_ids: Sequence[str] | Mapping[int, str]) -> tuple[str, str]:
    """``b – a``, the order of the subtraction, and the method."""
    return f"{run_ids[key[0]]} – {run_ids[key[1]]}", method_name(key[2])


def pair_clients(pairs: Mapping[Budget, RunPair]) -> str:
    """``48 × 1``: clients and seeds behind a row of pairs."""
    sizes, seeds = [pair.result.n_clients for pair in pairs.values()], {len(pair.seeds) for pair in pairs.values()}
    return f"{spread(sizes)} × {spread(seeds)}"
