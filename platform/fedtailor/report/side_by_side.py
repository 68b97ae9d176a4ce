"""All measures of a generation run in one table per pool: budgets and methods as rows, languages as columns.

For FedP2EFT's results on Fed-Aya (Tables 3 to 6, 10 and 11), where several measures stand side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd

from fedtailor.report.facts import Facts
from fedtailor.report.metrics import ROUGE_L, Measure, shown_beside
from fedtailor.report.names import in_method_order, in_pool_order, language_name, method_name, pool_name
from fedtailor.report.scores import Block, Cell, blocks
from fedtailor.report.tables import ABSENT, caption, file_label, percent
from fedtailor.report.wording import LATEX, MARKDOWN, escape, pipes

_BY = " / "


@dataclass(frozen=True)
class Beside:
    """One pool: the blocks of every measure.

    Args:
        measures: in the order of `metrics.GENERATION`.
        rows: (budget, a block per measure), ascending.
        languages: columns.
    """

    pool: str
    measures: tuple[Measure, ...]
    rows: tuple[tuple[int | None, tuple[Block, ...]], ...]
    languages: tuple[str, ...]

    @property
    def title(self) -> str:
        """``METEOR / ROUGE-1 / ROUGE-L``."""
        return _BY.join(measure.title for measure in self.measures)

    def at(self, budget: int | None) -> tuple[Block, ...]:
        """The blocks of a budget, empty where there are none."""
        return next((found for own, found in self.rows if own == budget), ())


def beside(scored: pd.DataFrame) -> list[Beside]:
    """A table per pool; none for a classification run.

    Args:
        scored: rows of `results.scores`.
    """
    measures = shown_beside(scored)
    found = [block for measure in measures for block in blocks(scored, measure)]
    tables = []
    for pool in in_pool_order(block.pool for block in found):
        here = [block for block in found if block.pool == pool]
        budgets = sorted({block.budget for block in here}, key=lambda r: -1 if r is None else r)
        rows = tuple((r, tuple(block for block in here if block.budget == r)) for r in budgets)
        languages = tuple(sorted({code for block in here for code in block.languages}))
        tables.append(Beside(pool, measures, rows, languages))
    return tables


@dataclass(frozen=True)
class Line:
    """One method at one budget.

    Args:
        cells: a list per language and one for the average, each with a cell per measure.
        wins: per measure.
    """

    budget: int | None
    method: str
    cells: tuple[tuple[Cell | None, ...], ...]
    wins: tuple[int | None, ...]


def lines(table: Beside) -> Iterator[Line]:
    """Rows in reading order; methods without a budget stand at every budget, as in the other tables."""
    for budget, found in table.rows:
        for method in in_method_order(name for block in found for name in block.methods):
            cells = [tuple(block.cells.get((code, method)) for block in found) for code in table.languages]
            cells.append(tuple(block.average.get(method) for block in found))
            yield Line(budget, method, tuple(cells), tuple(block.wins.get(method) for block in found))


def markdown(facts: Facts, table: Beside) -> str:
    """``metrics_<pool>.md``."""
    sentences = [escape(sentence, MARKDOWN) for sentence in sentences_of(facts, table)]
    head = f"# {escape(pool_name(table.pool), MARKDOWN)}: {table.title} (%)"
    rows = _rows(table, lambda word: escape(word, MARKDOWN), lambda word: f"**{word}**")
    return "\n\n".join([head, "\n".join(sentences), pipes(rows)]) + "\n"


def latex(facts: Facts, table: Beside) -> str:
    """``metrics_<pool>.tex`` (booktabs), sideways, a rule between budgets."""
    header, *rows = _rows(table, lambda word: escape(word, LATEX), lambda word: rf"\textbf{{{word}}}")
    body, before = [], rows[0][0] if rows else ""
    for row in rows:
        body += [r"\midrule"] if row[0] != before else []
        body.append(" & ".join(row).replace("r =", "$r$ =") + r" \\")
        before = row[0]
    words = escape(" ".join(sentences_of(facts, table)), LATEX)
    return "\n".join([
        r"% needs \usepackage[utf8]{inputenc} and the packages amssymb, booktabs, graphicx, rotating",
        r"\begin{sidewaystable*}[p]", r"\centering\scriptsize",
        rf"\caption{{{words}}}\label{{tab:metrics-{file_label(table.pool)}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}", r"\toprule", " & ".join(header) + r" \\", r"\midrule",
        *body, r"\bottomrule", r"\end{tabular}}", r"\end{sidewaystable*}",
    ]) + "\n"  # fmt: skip


def csv_table(table: Beside) -> pd.DataFrame:
    """``metrics_<pool>.csv``: a row per budget, method and measure; percent, empty where not measured.

    Columns: budget (-1 where no method has one), method, metric, each language and its ``/sd``, the average and its
    own, wins.
    """
    records = []
    for line in lines(table):
        for k, measure in enumerate(table.measures):
            budget = -1 if line.budget is None else line.budget
            record: dict[str, object] = {"budget": budget, "method": line.method, "metric": measure.name}
            for name, at in zip((*table.languages, "average"), line.cells, strict=True):
                cell = at[k]
                record[name] = None if cell is None else round(100 * cell.mean, 4)
                record[f"{name}/sd"] = None if cell is None or cell.sd is None else round(100 * cell.sd, 4)
            records.append(record | {"wins": line.wins[k]})
    return pd.DataFrame(records, dtype=object)


def sentences_of(facts: Facts, table: Beside) -> list[str]:
    """Sentences that let the table stand alone: those of the primary table, and what each measure is."""
    found = [block for _, row in table.rows for block in row]
    main = [block for block in found if block.measure.name == ROUGE_L.name]
    first, *rest = caption(facts, main)
    means = "; ".join(f"{m.title}: {m.value[0].lower()}{m.value[1:]}" for m in table.measures)
    return [first.replace(main[0].measure.title, f"{table.title}, in this order,", 1), f"{means}.", *rest]


def _rows(table: Beside, escaped: Callable[[str], str], bold: Callable[[str], str]) -> list[list[str]]:
    """Header and a row per budget and method, all cells escaped; the best of a language and budget is bold."""
    group = table.measures[0].group
    heads = [name if (name := language_name(code)) == code else f"{name} ({code})" for code in table.languages]
    rows = [["Budget", "Method", *map(escaped, heads), "Average", f"Wins ({group}s)"]]
    for line in lines(table):
        label = ABSENT if line.budget is None else f"r = {line.budget}"
        shown = [_BY.join(_text(cell, escaped, bold) for cell in at) for at in line.cells]
        counts = _BY.join(ABSENT if n is None else str(n) for n in line.wins)
        rows.append([escaped(label), escaped(method_name(line.method)), *shown, escaped(counts)])
    return rows


def _text(cell: Cell | None, escaped: Callable[[str], str], bold: Callable[[str], str]) -> str:
    if cell is None:
        return escaped(ABSENT)
    return bold(percent(cell.mean)) if cell.best else percent(cell.mean)
