"""The paper's table (FedP2EFT Tables 1, 2, 8, 9) of one pool as Markdown, CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from fedtailor.report.facts import Facts
from fedtailor.report.names import language_name, method_name, pool_name
from fedtailor.report.scores import Block, Cell
from fedtailor.report.wording import LATEX, MARKDOWN, NOT_RECORDED, counted, escape, pipes

ABSENT = "–"

_UPRIGHT_COLUMNS, _SIDEWAYS_COLUMNS = 10, 14

_PACKAGES = "amssymb, booktabs, graphicx, rotating"


def percent(value: float | None) -> str:
    """A fraction in percent with two decimals; `ABSENT` for None.

    >>> percent(0.84216), percent(None)
    ('84.22', '–')
    """
    return ABSENT if value is None else f"{100 * value:.2f}"


def points(value: float) -> str:
    """A signed difference of fractions in percentage points, with a true minus sign."""
    return f"{100 * value:+.2f}".replace("-", "−")


def block_title(block: Block) -> str:
    """``r = 8``, or a phrase where no method has budgets."""
    return "No budget" if block.budget is None else f"r = {block.budget}"


def caption(facts: Facts, found: Sequence[Block]) -> list[str]:
    """Sentences that let a table stand alone: numbers, task, model, base, scale, data, departures, run.

    Args:
        facts: facts of the run.
        found: the blocks of one pool, at least one.
    """
    block, measure = found[0], found[0].measure
    clients = counted(block.n_clients, "client")
    seeds = ", ".join(str(seed) for seed in block.seeds)
    spread = "mean (SD) over seeds" if len(block.seeds) > 1 else "one seed, so no SD (–)"
    changed = "; ".join(f"{o.key}: {o.default} → {o.value}" for o in facts.overrides)
    sentences = [
        f"{measure.title} in percent on {pool_name(block.pool).lower()}: {spread}; the best of each {measure.group} "
        "and budget in bold.",
        facts.scale,
        facts.privacy,
        f"Task {facts.task}, model {facts.model} with L = {facts.n_modules} adapted layers, budget rL ranks; "
        f"{clients} in {counted(len(languages_of(found)), measure.group)}; seeds {seeds}.",
        facts.pretrained,
        f"Base model: {facts.base_line}; strategies: {facts.strategy_line}.",
        facts.fallbacks.get(block.pool, ""),
        facts.duplicates,
        f"{measure.pooling}; Average weighs {measure.groups} equally; Wins counts the {measure.groups} where no "
        "method is better at that budget, ties for each.",
        f"Departures from the defaults (default → used): {changed or 'none'}.",
        f"Run {facts.run_id}"
        + ("" if facts.status == NOT_RECORDED else f" ({facts.status})")
        + f"; {facts.version_line}.",
    ]
    return [sentence for sentence in sentences if sentence]


def markdown_table(facts: Facts, found: Sequence[Block]) -> str:
    """One pool as Markdown, one block per budget, columns padded so that the source reads as well."""
    sentences = [escape(sentence, MARKDOWN) for sentence in caption(facts, found)]
    parts = [f"# {escape(pool_name(found[0].pool), MARKDOWN)}: {found[0].measure.phrase} (%)", "\n".join(sentences)]
    for block in found:
        rows = _rows(block, lambda word: escape(word, MARKDOWN), lambda word: f"**{word}**", " ")
        parts += [f"## {block_title(block)}", pipes(rows)]
    return "\n\n".join(parts) + "\n"


def latex_table(facts: Facts, found: Sequence[Block]) -> str:
    """One pool in LaTeX (booktabs), never wider than the text.

    Two budgets stand side by side where they fit, upright or sideways; long tables take several floats.
    """
    sentences = " ".join(escape(sentence, LATEX) for sentence in caption(facts, found))
    columns = 2 * max(len(block.methods) for block in found)
    side_by_side = 2 if columns <= _SIDEWAYS_COLUMNS else 1
    sideways = side_by_side == 2 and columns > _UPRIGHT_COLUMNS and len(found) > 1
    panels = [panel for k in range(0, len(found), side_by_side) for panel in _panels(found[k : k + side_by_side])]
    per_page, kind = (2, "sidewaystable*") if sideways else (3, "table*")
    label = f"tab:{file_label(found[0].pool)}"
    floats = [
        _float(kind, panels[k : k + per_page], rf"{sentences}}}\label{{{label}" if not k else "Continued.")
        for k in range(0, len(panels), per_page)
    ]
    return "\n\n".join([rf"% needs \usepackage[utf8]{{inputenc}} and the packages {_PACKAGES}", *floats]) + "\n"


def _float(kind: str, panels: Sequence[str], words: str) -> str:
    lines = [
        rf"\begin{{{kind}}}[p]",
        r"\centering\scriptsize\setlength{\tabcolsep}{3pt}\setlength{\belowcaptionskip}{6pt}",
        rf"\caption{{{words}}}",
        "\n\\par\\medskip\n".join(panels),
        rf"\end{{{kind}}}",
    ]
    return "\n".join(lines)


def _panels(found: Sequence[Block]) -> list[str]:
    """One panel; blocks that list different rows (results are missing) get one each."""
    same = all(b.languages == found[0].languages for b in found)
    return [_panel(found)] if same else [_panel([block]) for block in found]


def _panel(found: Sequence[Block]) -> str:
    columns = [
        _rows(block, lambda word: escape(word, LATEX), lambda word: rf"\textbf{{{word}}}", r"\,") for block in found
    ]
    names, titles, rules, at = columns[0], [], [], 2
    for block, rows in zip(found, columns, strict=True):
        n = len(rows[0]) - 1
        titles.append(rf"\multicolumn{{{n}}}{{c}}{{{escape(block_title(block), LATEX).replace('r =', '$r$ =')}}}")
        rules.append(rf"\cmidrule(lr){{{at}-{at + n - 1}}}")
        at += n
    body = [
        " & ".join([names[k][0], *(cell for rows in columns for cell in rows[k][1:])]) + r" \\"
        for k in range(len(names))
    ]
    last = len(body) - len(_summary_rows(found[0]))
    lines = [
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (at - 2)}}}",
        r"\toprule",
        " & ".join(["", *titles]) + r" \\",
        " ".join(rules),
        *body[:1],
        r"\midrule",
        *body[1:last],
        r"\midrule",
        *body[last:],
        r"\bottomrule",
        r"\end{tabular}}",
    ]
    return "\n".join(lines)


def _rows(block: Block, escape: Callable[[str], str], bold: Callable[[str], str], gap: str) -> list[list[str]]:
    """Header, a row per language, then `_summary_rows`; all cells escaped."""

    def show(cell: Cell | None) -> str:
        if cell is None:
            return escape(ABSENT)
        mean = percent(cell.mean)
        return f"{bold(mean) if cell.best else mean}{gap}({escape(percent(cell.sd))})"

    rows = [[block.measure.group.capitalize(), *(escape(method_name(m)) for m in block.methods)]]
    for code in block.languages:
        name = language_name(code)
        label = escape(name if name == code else f"{name} ({code})")
        rows.append([label, *(show(block.cells.get((code, m))) for m in block.methods)])
    for label, values in _summary_rows(block):
        top = [value for value in values if isinstance(value, int)]
        cells = [show(v) if isinstance(v, Cell) else bold(str(v)) if v == max(top) else str(v) for v in values]
        rows.append([escape(label), *cells])
    return rows


def _summary_rows(block: Block) -> list[tuple[str, list[Cell | int]]]:
    return [
        ("Average", [block.average[m] for m in block.methods]),
        ("Wins", [block.wins[m] for m in block.methods]),
    ]


def csv_table(found: Sequence[Block]) -> pd.DataFrame:
    """One pool as the page shows it: a row per language, then Average and Wins; percent, empty where not measured.

    Columns: language, name, then ``r<budget>/<method>`` and ``r<budget>/<method>/sd`` per budget and method.

    Args:
        found: the blocks of one pool, at least one.
    """
    codes = languages_of(found)
    table = pd.DataFrame(
        {"language": [*codes, "average", "wins"], "name": [*map(language_name, codes), "Average", "Wins"]}
    )
    columns: dict[str, list[float | int | None]] = {}
    for block in found:
        for method in block.methods:
            key = method if block.budget is None else f"r{block.budget}/{method}"
            cells = [*(block.cells.get((code, method)) for code in codes), block.average[method]]
            columns[key] = [*(None if cell is None else _rounded(cell.mean) for cell in cells), block.wins[method]]
            columns[f"{key}/sd"] = [*(None if c is None or c.sd is None else _rounded(c.sd) for c in cells), None]
    return pd.concat([table, pd.DataFrame(columns, dtype=object)], axis=1)


def languages_of(found: Sequence[Block]) -> tuple[str, ...]:
    """Languages of a pool over all its blocks, sorted."""
    return tuple(sorted({code for block in found for code in block.languages}))


def _rounded(fraction: float) -> float:
    return round(100 * fraction, 4)


def file_label(pool: str) -> str:
    """A pool as part of a file name."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in pool) or "all"
