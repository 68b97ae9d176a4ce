"""All measures of a generation run in one table per pool: budgets and methods as rows, languages as columns.

For FedP2EFT's results on Fed-Aya (Tables 3 to 6, 10 and 11), where several measures stand side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from fedtailor.report.grid import Grid
from fedtailor.report.metrics import ROUGE_L, shown_beside
from fedtailor.report.names import in_budget_order, in_method_order, in_pool_order, method_name, pool_name
from fedtailor.report.scores import AVERAGE, Block, blocks
from fedtailor.report.tables import file_label, in_percent, language_title, languages_of
from fedtailor.report.wording import ABSENT, budget_title, percent

BY = " / "

Row = tuple[int | None, str, tuple[Block, ...]]


def beside(scored: pd.DataFrame) -> dict[str, tuple[Block, ...]]:
    """Pool to the blocks of all measures, in the order of `metrics.GENERATION`; empty for a classification run.

    Args:
        scored: rows of `results.scores`.
    """
    found = [block for measure in shown_beside(scored) for block in blocks(scored, measure)]
    pools = in_pool_order(block.pool for block in found)
    return {pool: tuple(block for block in found if block.pool == pool) for pool in pools}


def measures_grid(found: Sequence[Block], caption: Sequence[str]) -> Grid:
    """``metrics_<pool>``, the best of a language, budget and measure in bold.

    Args:
        found: the blocks of one pool.
        caption: sentences of the pool's main table.
    """
    codes, measures = languages_of(found), list(dict.fromkeys(block.measure for block in found))
    rows, bold = [], set()
    for i, (budget, method, here) in enumerate(_rows(found)):
        cells = [[block.cell(code, method) for block in here] for code in (*codes, AVERAGE)]
        places = [(j, k, cell) for j, at in enumerate(cells, 2) for k, cell in enumerate(at)]
        bold |= {(i, j, 2 * k) for j, k, cell in places if cell is not None and cell.best}  # slashes are words too
        texts = [[percent(None if cell is None else cell.mean) for cell in at] for at in cells]
        texts.append([str(block.wins.get(method, ABSENT)) for block in here])
        rows.append([ABSENT if budget is None else budget_title(budget), method_name(method), *map(BY.join, texts)])
    titles, (first, *rest) = BY.join(measure.title for measure in measures), caption
    means = "; ".join(f"{m.title}: {m.value[0].lower()}{m.value[1:]}" for m in measures)
    return Grid(
        header=["Budget", "Method", *map(language_title, codes), "Average", f"Wins ({measures[0].groups})"],
        rows=rows,
        bold=bold,
        caption=[first.replace(ROUGE_L.title, f"{titles}, in this order,", 1), f"{means}.", *rest],
        title=f"{pool_name(found[0].pool)}: {titles} (%)",
        label=f"metrics-{file_label(found[0].pool)}",
        rules={i for i, row in enumerate(rows) if i and row[0] != rows[i - 1][0]},
        labels=2,
        sideways=True,
    )


def measures_data(found: Sequence[Block]) -> pd.DataFrame:
    """A row per budget, method and measure of a pool; percent, empty where not measured.

    Columns: budget (-1 where no method has one), method, metric, each language and its ``/sd``, the average and its
    own, wins.
    """
    records = []
    for budget, method, here in _rows(found):
        for block in here:
            record: dict[str, object] = {"budget": -1 if budget is None else budget, "method": method}
            record["metric"] = block.measure.name
            for name in (*languages_of(found), AVERAGE):
                record[name], record[f"{name}/sd"] = in_percent(block.cell(name, method))
            records.append(record | {"wins": block.wins.get(method)})
    return pd.DataFrame(records, dtype=object)


def _rows(found: Sequence[Block]) -> list[Row]:
    """Budget, method and the blocks of the budget; methods without a budget stand at every one."""
    rows: list[Row] = []
    for budget in in_budget_order(block.budget for block in found):
        here = tuple(block for block in found if block.budget == budget)
        rows += [(budget, name, here) for name in in_method_order(name for block in here for name in block.methods)]
    return rows
