"""A table of text, filled once and written as Markdown, LaTeX (booktabs) and, with its numbers, CSV."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import pandas as pd

from fedtailor.report.names import LATEX, MARKDOWN, escape

_UPRIGHT_COLUMNS, _SIDEWAYS_COLUMNS = 10, 14
plain, _tex = partial(escape, rules=MARKDOWN), partial(escape, rules=LATEX)
_PREAMBLE = r"% needs \usepackage[utf8]{inputenc} and the packages amssymb, booktabs, graphicx, rotating"


@dataclass(frozen=True)
class Grid:
    """A table as plain text: `markdown` and `latex` escape it.

    Args:
        header: a title per column.
        rows: each a cell per column.
        bold: (row, column, word) of the words in bold; the words of a cell are parted by single spaces.
        caption: sentences that let the table stand alone.
        title: heading in Markdown, none if empty.
        label: of the LaTeX float, ``tab:<label>``.
        groups: title and number of columns of each group behind the labels, a table each in Markdown and beside
            each other in LaTeX where they fit; default: all columns are one group.
        rules: rows above which LaTeX draws a line.
        notes: a list below the table in Markdown.
        labels: leading columns that name a row.
        sideways: whether LaTeX turns the page.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: Collection[tuple[int, int, int]] = ()
    caption: Sequence[str] = ()
    title: str = ""
    label: str = ""
    groups: Sequence[tuple[str, int]] = ()
    rules: Collection[int] = ()
    notes: Sequence[str] = ()
    labels: int = 1
    sideways: bool = False

    @property
    def parts(self) -> list[tuple[str, range]]:
        """Title and columns of each group."""
        groups = self.groups or [("", len(self.header) - self.labels)]
        edges = pairwise(accumulate((n for _, n in groups), initial=self.labels))
        return [(title, range(*edge)) for (title, _), edge in zip(groups, edges, strict=True)]


def write_grids(grids: Sequence[Grid], data: pd.DataFrame, folder: Path, stem: str) -> None:
    """Writes ``<stem>.md``, ``<stem>.tex`` and ``<stem>.csv``.

    Args:
        grids: one after the other, at least one.
        data: their numbers, unrounded or rounded as a reader of CSV wants them.
        folder: exists.
        stem: name without suffix.
    """
    pages = {"md": "\n\n".join(map(markdown, grids)), "tex": "\n\n".join([_PREAMBLE, *map(latex, grids)])}
    for suffix, page in pages.items():
        (folder / f"{stem}.{suffix}").write_text(f"{page}\n", encoding="utf-8", newline="\n")
    data.to_csv(folder / f"{stem}.csv", index=False, lineterminator="\n")


def markdown(grid: Grid) -> str:
    """Title, caption, a table per group whose source reads as well, notes; what is empty is left out.

    >>> print(markdown(Grid(["Method", "r = 2"], [["my_lora", "84.22 (–)"]], bold={(0, 1, 0)})))
    | Method   |         r = 2 |
    | -------- | ------------: |
    | my\\_lora | **84.22** (–) |
    """
    blocks = [f"# {plain(grid.title)}"] if grid.title else []
    blocks += ["\n".join(map(plain, grid.caption))] if grid.caption else []
    for title, columns in grid.parts:
        blocks += [f"## {plain(title)}"] if title else []
        blocks.append(pipes(_cells(grid, columns, plain, "**{}**"), grid.labels))
    blocks += ["\n".join(f"- {plain(note)}" for note in grid.notes)] if grid.notes else []
    return "\n\n".join(blocks)


def pipes(rows: Sequence[Sequence[str]], labels: int = 1) -> str:
    """Labels stand on the left, numbers on the right; padded so that the source reads as well."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width if k < labels else "-" * (width - 1) + ":" for k, width in enumerate(widths)]
    sides = ["<" if k < labels else ">" for k in range(len(widths))]
    lines = [rows[0], rule, *rows[1:]]
    return "\n".join(
        f"| {' | '.join(f'{c:{s}{w}}' for c, s, w in zip(line, sides, widths, strict=True))} |" for line in lines
    )


def latex(grid: Grid) -> str:
    """Floats, never wider than the text: two groups beside each other where they fit; many take several floats."""
    parts = grid.parts
    width = 2 * max(len(columns) for _, columns in parts)
    beside = 2 if width <= _SIDEWAYS_COLUMNS else 1
    sideways = grid.sideways or (len(parts) > 1 and _UPRIGHT_COLUMNS < width <= _SIDEWAYS_COLUMNS)
    panels = [_panel(grid, parts[k : k + beside]) for k in range(0, len(parts), beside)]
    per_page, kind = (2, "sidewaystable*") if sideways else (3, "table*")
    words = rf"{_tex(' '.join(grid.caption))}}}\label{{tab:{grid.label}"
    return "\n\n".join(
        "\n".join([
            rf"\begin{{{kind}}}[p]",
            r"\centering\scriptsize\setlength{\tabcolsep}{3pt}\setlength{\belowcaptionskip}{6pt}",
            rf"\caption{{{'Continued.' if k else words}}}",
            "\n\\par\\medskip\n".join(panels[k : k + per_page]),
            rf"\end{{{kind}}}",
        ])
        for k in range(0, len(panels), per_page)
    )  # fmt: skip


def _panel(grid: Grid, parts: Sequence[tuple[str, range]]) -> str:
    columns = [column for _, own in parts for column in own]
    header, *body = (" & ".join(row) + r" \\" for row in _cells(grid, columns, _tex, r"\textbf{{{}}}"))
    edges = list(accumulate((len(own) for _, own in parts), initial=grid.labels))
    titles = [rf"\multicolumn{{{len(own)}}}{{c}}{{{_typeset(_tex(title))}}}" for title, own in parts]
    above = [
        " & ".join([*[""] * grid.labels, *titles]) + r" \\",
        " ".join(rf"\cmidrule(lr){{{a + 1}-{b}}}" for a, b in pairwise(edges)),
    ]
    return "\n".join([
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{'l' * grid.labels}{'r' * len(columns)}}}",
        r"\toprule",
        *(above if grid.groups else []),
        _typeset(header),
        r"\midrule",
        *(line for k, row in enumerate(body) for line in ([r"\midrule"] if k in grid.rules else []) + [_typeset(row)]),
        r"\bottomrule",
        r"\end{tabular}}",
    ])  # fmt: skip


def _cells(grid: Grid, columns: Sequence[int], show: Callable[[str], str], strong: str) -> list[list[str]]:
    """Header and rows, escaped, of the labels and some columns."""
    at = [*range(grid.labels), *columns]

    def cell(i: int, j: int) -> str:
        words = enumerate(map(show, grid.rows[i][j].split(" ")))
        return " ".join(strong.format(word) if (i, j, k) in grid.bold else word for k, word in words)

    return [[show(grid.header[j]) for j in at], *([cell(i, j) for j in at] for i in range(len(grid.rows)))]


def _typeset(line: str) -> str:
    """Sets the r of a budget in math, and a thin space between a mean and its SD."""
    return re.sub(r"(?<=[\d}]) \(", r"\\,(", re.sub(r"\br = (?=\d)", "$r$ = ", line))
