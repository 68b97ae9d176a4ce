"""The tables of a report, each its text as a grid and its numbers as a frame.

The paper's table of one pool (FedP2EFT Tables 1, 2, 8, 9) has languages as rows, budgets and methods as columns. A
generation run has a second one with all measures beside each other, as FedP2EFT's results on Fed-Aya (Tables 3 to 6, 10
and 11): budgets and methods as rows, languages as columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from fedtailor.experiment.config import method_notes
from fedtailor.models.source import model_title
from fedtailor.report import names
from fedtailor.report.facts import RunFacts
from fedtailor.report.grid import Grid
from fedtailor.report.names import ABSENT, NOT_RECORDED
from fedtailor.report.scores import AVERAGE, Block, Cell, answer_measures, blocks
from fedtailor.report.unknown_tokens import unknown_sentence
from fedtailor.tasks.sorted_share import skew_sentence
from fedtailor.tasks.validation import pool_sentence

SEPARATOR = " / "
"""Between the measures of one cell."""

Row = tuple[int | None, str, tuple[Block, ...]]


def table_grid(facts: RunFacts, found: Sequence[Block], also: Sequence[str] = ()) -> Grid:
    """``table_<pool>``: a row per language, then Average and Wins; a group of columns per budget.

    Args:
        facts: facts of the run.
        found: the blocks of one pool, at least one.
        also: sentences about its data.
    """
    columns = [(block, method) for block in found for method in block.methods]
    codes, measure = languages_of(found), found[0].measure
    rows, bold = [], set()
    for i, code in enumerate((*codes, AVERAGE)):
        cells = [block.cell(code, method) for block, method in columns]
        bold |= {(i, j, 0) for j, cell in enumerate(cells, 1) if cell is not None and cell.best}
        rows.append(["Average" if code == AVERAGE else language_title(code), *map(_score, cells)])
    bold |= {(len(rows), j, 0) for j, (b, m) in enumerate(columns, 1) if b.wins[m] == max(b.wins.values())}
    rows.append(["Wins", *(str(block.wins[method]) for block, method in columns)])
    return Grid(
        header=[measure.group.capitalize(), *(names.method_name(method) for _, method in columns)],
        rows=rows,
        bold=bold,
        caption=_caption(facts, found, also),
        title=f"{names.pool_name(found[0].pool)}: {measure.phrase} (%)",
        label=file_label(found[0].pool),
        groups=[(names.budget_title(block.budget), len(block.methods)) for block in found],
        rules={len(codes)},
    )


def _caption(facts: RunFacts, found: Sequence[Block], also: Sequence[str]) -> list[str]:
    """Sentences that let a table stand alone: numbers, task, model, base, scale, data, departures, run."""
    block, measure, exp = found[0], found[0].measure, facts.experiment
    clients, pool = names.plural(block.n_clients, "client"), names.pool_name(block.pool).lower()
    seeds = ", ".join(str(seed) for seed in block.seeds)
    spread = "mean (SD) over seeds" if len(block.seeds) > 1 else "one seed, so no SD (–)"
    changed = "; ".join(f"{key}: {default} → {value}" for key, default, value in facts.overrides)
    sentences = [
        f"{measure.title} in percent on {pool}: {spread}; the best of each {measure.group} and budget in bold.",
        facts.scale,
        facts.privacy,
        f"Task {exp.task.title}, model {model_title(exp.model)} with L = {facts.n_modules} adapted layers, budget rL "
        f"ranks; {clients} in {names.plural(len(languages_of(found)), measure.group)}; seeds {seeds}.",
        facts.pretrained,
        unknown_sentence(facts.unknown),
        skew_sentence(exp.task),
        pool_sentence(exp.task, exp.task_entry.kind),
        f"Base model: {facts.base_line}; strategies: {facts.strategy_line}.",
        facts.fallbacks.get(block.pool, ""),
        facts.duplicates,
        *also,
        f"{measure.pooling}; Average weighs {measure.groups} equally; Wins counts the {measure.groups} where no "
        "method is better at that budget, ties for each.",
        *method_notes(exp, [method for other in found for method in other.methods]),
        f"Departures from the defaults (default → used): {changed or 'none'}.",
        f"Run {facts.run_id}"
        + ("" if facts.status == NOT_RECORDED else f" ({facts.status})")
        + f"; {facts.version_line}.",
    ]
    return [sentence for sentence in sentences if sentence]


def table_data(found: Sequence[Block]) -> pd.DataFrame:
    """The rows of `table_grid` in percent, empty where not measured.

    Columns: language, name, then ``r<budget>/<method>`` and ``r<budget>/<method>/sd`` per budget and method.

    Args:
        found: the blocks of one pool, at least one.
    """
    codes = languages_of(found)
    columns: dict[str, list[object]] = {
        "language": [*codes, AVERAGE, "wins"],
        "name": [*map(names.language_name, codes), "Average", "Wins"],
    }
    for block in found:
        for method in block.methods:
            key = method if block.budget is None else f"r{block.budget}/{method}"
            numbers = [as_shown(block, code, method) for code in (*codes, AVERAGE)]
            columns[key] = [*(mean for mean, _ in numbers), block.wins[method]]
            columns[f"{key}/sd"] = [*(sd for _, sd in numbers), None]
    return pd.DataFrame(columns, dtype=object)


def languages_of(found: Sequence[Block]) -> tuple[str, ...]:
    """Languages of a pool over all its blocks, sorted."""
    return tuple(sorted({code for block in found for code in block.languages}))


def language_title(code: str) -> str:
    """``Amharic (amh)``."""
    return code if (name := names.language_name(code)) == code else f"{name} ({code})"


def as_shown(block: Block, language: str, method: str) -> tuple[float | None, float | None]:
    """Mean and SD in percent, where that is how the measure is shown, with four decimals; None: not measured."""
    cell, unit = block.cell(language, method), 100 if block.measure.percent else 1
    if cell is None:
        return None, None
    return round(unit * cell.mean, 4), None if cell.sd is None else round(unit * cell.sd, 4)


def _score(cell: Cell | None) -> str:
    return ABSENT if cell is None else f"{names.percent(cell.mean)} ({names.percent(cell.sd)})"


def file_label(pool: str) -> str:
    """A pool as part of a file name."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in pool) or "all"


def measure_blocks(scored: pd.DataFrame) -> dict[str, tuple[Block, ...]]:
    """Pool to the blocks of all measures, in the order of `GENERATION`; empty for a classification run.

    Args:
        scored: rows of `scores.scored_rows`.
    """
    found = [block for measure in answer_measures(scored) for block in blocks(scored, measure)]
    pools = names.in_pool_order(block.pool for block in found)
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
        numbers = [[as_shown(block, code, method)[0] for block in here] for code in (*codes, AVERAGE)]
        places = [(j, k, cell) for j, at in enumerate(cells, 2) for k, cell in enumerate(at)]
        bold |= {(i, j, 2 * k) for j, k, cell in places if cell is not None and cell.best}  # slashes are words too
        texts = [[ABSENT if number is None else f"{number:.2f}" for number in at] for at in numbers]
        texts.append([str(block.wins.get(method, ABSENT)) for block in here])
        title = ABSENT if budget is None else names.budget_title(budget)
        rows.append([title, names.method_name(method), *map(SEPARATOR.join, texts)])
    titles, (first, *rest) = SEPARATOR.join(measure.title for measure in measures), caption
    main = next(measure.title for measure in measures if first.startswith(measure.title))
    plain = [measure.title for measure in measures if not measure.percent]
    unit = f"%; {' and '.join(plain)} as they are" if plain else "%"
    means = "; ".join(f"{m.title}: {m.value[0].lower()}{m.value[1:]}" for m in measures)
    return Grid(
        header=["Budget", "Method", *map(language_title, codes), "Average", f"Wins ({measures[0].groups})"],
        rows=rows,
        bold=bold,
        caption=[first.replace(main, f"{titles}, in this order,", 1), f"{means}.", *rest],
        title=f"{names.pool_name(found[0].pool)}: {titles} ({unit})",
        label=f"metrics-{file_label(found[0].pool)}",
        rules={i for i, row in enumerate(rows) if i and row[0] != rows[i - 1][0]},
        labels=2,
        sideways=True,
    )


def measures_data(found: Sequence[Block]) -> pd.DataFrame:
    """A row per budget, method and measure of a pool, as `as_shown`; empty where not measured.

    Columns: budget (-1 where no method has one), method, metric, each language and its ``/sd``, the average and its
    own, wins.
    """
    records = []
    for budget, method, here in _rows(found):
        for block in here:
            record: dict[str, object] = {"budget": -1 if budget is None else budget, "method": method}
            record["metric"] = block.measure.name
            for name in (*languages_of(found), AVERAGE):
                record[name], record[f"{name}/sd"] = as_shown(block, name, method)
            records.append(record | {"wins": block.wins.get(method)})
    return pd.DataFrame(records, dtype=object)


def _rows(found: Sequence[Block]) -> list[Row]:
    """Budget, method and the blocks of the budget; methods without a budget stand at every one."""
    return [
        (budget, method, here)
        for budget in names.in_budget_order(block.budget for block in found)
        if (here := tuple(block for block in found if block.budget == budget))
        for method in names.in_method_order(name for block in here for name in block.methods)
    ]
