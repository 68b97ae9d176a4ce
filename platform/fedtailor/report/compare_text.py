"""The comparison as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from fedtailor.report.compare_content import Comparison, behind, cell_text, pair_clients, pair_text, pair_title
from fedtailor.report.compare_differences import Row
from fedtailor.report.compare_pairs import rule
from fedtailor.report.compare_tables import PoolTable
from fedtailor.report.names import method_name, pool_name
from fedtailor.report.wording import MARKDOWN, budget_title, escape, pipes


def markdown(content: Comparison) -> str:
    """``compare.md``."""
    ids = content.run_ids
    parts = [f"# {_plain(' · '.join(ids))}", "## Runs", pipes(_transposed("", ids, content.facts))]
    if content.notes:
        parts.append("\n".join(f"- {_plain(note)}" for note in content.notes))
    parts += ["## What differs", _changes(content)]
    for table in content.tables:
        parts += [
            f"## {_plain(pool_name(table.pool))}: {content.measure.phrase} (%)",
            _plain(content.table_rule),
            pipes(_results(ids, table)),
        ]
    parts.append(f"![{content.measure.title} per budget](compare.svg)")
    for table in content.tables:
        if content.grid(table.pool):
            parts += [f"## {_plain(pool_name(table.pool))}: paired differences", _plain(rule(content.measure))]
            parts.append(pipes(_pairs(content, table)))
    if content.wandb:
        parts += ["## W&B", "\n".join(f"- {sentence}" for sentence in content.wandb)]
    return "\n\n".join(parts) + "\n"


def _changes(content: Comparison) -> str:
    rows, neutral = content.changed.rows, content.changed.neutral
    parts = [pipes(_transposed("Key", content.run_ids, rows))] if rows else ["No key that can change a number."]
    if neutral:
        parts.append(f"Differ too, but change no number here: {_plain(', '.join(neutral))}.")
    return "\n\n".join(parts)


def _transposed(title: str, ids: Sequence[str], rows: Sequence[Row]) -> list[list[str]]:
    return [[title, *map(_plain, ids)], *([_plain(name), *map(_plain, values)] for name, values in rows)]


def _results(ids: Sequence[str], table: PoolTable) -> list[list[str]]:
    rows = [["Run", "Method", *map(budget_title, table.budgets), "Clients × seeds"]]
    for line in table.lines:
        cells = []
        for budget in table.budgets:
            mean, sd = cell_text(cell := line.cells.get(budget))
            cells.append(f"{f'**{mean}**' if cell is not None and cell.best else mean} {sd}".strip())
        rows.append([_plain(ids[line.run]), _plain(method_name(line.method)), *cells, behind(line)])
    return rows


def _pairs(content: Comparison, table: PoolTable) -> list[list[str]]:
    rows = [["Runs", "Method", *map(budget_title, table.budgets), "Clients × seeds"]]
    for key, at in content.grid(table.pool).items():
        cells = [_plain(" ".join(pair_text(at.get(budget))).strip()) for budget in table.budgets]
        rows.append([*map(_plain, pair_title(key, content.run_ids)), *cells, pair_clients(at)])
    return rows


def _plain(word: str) -> str:
    return escape(word, MARKDOWN)
