"""What ``fedtailor compare`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedtailor.runs.comparison.content import (
    Comparison,
    behind,
    cell_text,
    pair_text,
    pair_title,
)
from fedtailor.runs.comparison.differences import Row, told_apart
from fedtailor.runs.comparison.make import PAGE
from fedtailor.runs.comparison.pairs import RunPair
from fedtailor.runs.comparison.tables import PoolTable
from fedtailor.runs.console import plain_table
from fedtailor.runs.report.metrics import Measure
from fedtailor.runs.report.names import method_name, pool_name, shortened
from fedtailor.runs.report.significance import LEVEL
from fedtailor.runs.report.verdicts import budget_title

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LONGEST = 60
_SUM = "clients × seeds"


def show(console: Console, content: Comparison, out: Path) -> None:
    """Runs, differences, results and paired differences to the first run, then where everything was written."""
    letters = letters_of(content.run_ids)
    console.print(_transposed("", letters, [("Run", content.run_ids), *content.facts], "Runs"))
    if content.changed.rows:
        console.print(_transposed("key", letters, [told_apart(row) for row in content.changed.rows], "What differs"))
    else:
        console.print("[bold]What differs[/]  no key that can change a number", highlight=False)
    for table in content.tables:
        console.print(_results(letters, table, content.measure))
        if content.grid(table.pool):
            console.print(_pairs(content, letters, table))
    if content.pairs:
        rest = f", and differences not from {letters[0]}," if any(pair.other for pair in content.pairs) else ""
        console.print(
            f"[dim]▲ better, ▼ worse (p < {LEVEL:g}). 95 % intervals{rest} are in {PAGE}.[/]", highlight=False
        )
    for note in content.notes:
        console.print(f"[yellow]note[/] {escape(note)}", highlight=False)
    for sentence in content.wandb:
        console.print(f"[cyan]W&B[/]  {escape(sentence)}", highlight=False, soft_wrap=True)
    console.print(f"[green]written[/]  {escape(str(out / PAGE))}", highlight=False, soft_wrap=True)


def letters_of(run_ids: Sequence[str]) -> list[str]:
    """Short names for tables: A, B, ...; numbers where letters do not suffice."""
    if len(run_ids) <= len(_LETTERS):
        return list(_LETTERS[: len(run_ids)])
    return [str(number + 1) for number in range(len(run_ids))]


def _transposed(name: str, letters: Sequence[str], rows: Sequence[Row], title: str) -> Table:
    table = plain_table(name, *letters, title=title)
    for key, values in rows:
        table.add_row(escape(key), *(escape(shortened(value, _LONGEST)) for value in values))
    return table


def _results(letters: Sequence[str], table: PoolTable, measure: Measure) -> Table:
    heads = [budget_title(budget) for budget in table.budgets]
    title = f"{escape(pool_name(table.pool))}: {measure.phrase} in %, {measure.mean} (SD over seeds)"
    shown = plain_table("run", "method", *heads, _SUM, title=title, numbers=(*heads, _SUM))
    for number, line in enumerate(table.lines):
        cells = []
        for budget in table.budgets:
            mean, sd = cell_text(cell := line.cells.get(budget))
            cells.append(f"{f'[bold]{mean}[/]' if cell is not None and cell.best else mean} {sd}".strip())
        first = number == 0 or table.lines[number - 1].run != line.run
        last = number + 1 == len(table.lines) or table.lines[number + 1].run != line.run
        name = letters[line.run] if first else ""
        shown.add_row(name, escape(method_name(line.method)), *cells, behind(line), end_section=last)
    return shown


def _pairs(content: Comparison, letters: Sequence[str], table: PoolTable) -> Table:
    """The pairs with the first run, which is the reference; with none of it, all of them."""
    rows = content.grid(table.pool)
    rows = {key: at for key, at in rows.items() if key[1] == 0} or rows
    heads = [budget_title(budget) for budget in table.budgets]
    title = f"{escape(pool_name(table.pool))}: paired differences in points (corrected p)"
    shown = plain_table("runs", "method", *heads, title=title, numbers=heads)
    for key, at in rows.items():
        runs, method = pair_title(key, letters)
        shown.add_row(runs, escape(method), *(_short(at.get(budget)) for budget in table.budgets))
    return shown


def _short(pair: RunPair | None) -> str:
    """``+3.28▲ (<0.001)``: without the interval, so that four budgets fit into 100 columns."""
    told, _, p = pair_text(pair)
    return escape(f"{told.replace(' ▲', '▲').replace(' ▼', '▼')} {p and f'({p[2:]})'}".strip())
