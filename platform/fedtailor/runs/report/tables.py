"""The paper's table (FedP2EFT Tables 1, 2) of one pool in Markdown and LaTeX: languages, budgets, methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedtailor.runs.report.facts import NOT_RECORDED, Facts, counted, rounds
from fedtailor.runs.report.names import language_name, method_name, pool_name
from fedtailor.runs.report.results import REFERENCE, Block, Cell, Versus

ABSENT = "–"
_UPRIGHT_COLUMNS, _SIDEWAYS_COLUMNS = 10, 14
_PACKAGES = "amssymb, booktabs, graphicx, rotating"
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "·": r"$\cdot$", "²": "$^2$", "λ": r"$\lambda$",
    "Δ": r"$\Delta$", "→": r"$\to$", "±": r"$\pm$", "−": "$-$", "–": "--", "▲": r"$\blacktriangle$",
    "▼": r"$\blacktriangledown$", "\n": " ",
}  # fmt: skip
_MARKDOWN = {c: f"\\{c}" for c in "\\`*_[]<>|#$~"} | {"\n": " ", "\r": " ", "&": "&amp;"}


def percent(value: float | None) -> str:
    """A fraction in percent with two decimals; `ABSENT` for None.

    >>> percent(0.84216), percent(None)
    ('84.22', '–')
    """
    return ABSENT if value is None else f"{100 * value:.2f}"


def points(value: float) -> str:
    """A signed difference of fractions in percentage points, with a true minus sign."""
    return f"{100 * value:+.2f}".replace("-", "−")


def versus_text(versus: Versus | None) -> str:
    """``+3.21 ± 0.45 ▲``: points over base, standard error, and a mark beyond 2 standard errors."""
    if versus is None:
        return ABSENT
    error = "" if versus.standard_error is None else f" ± {100 * versus.standard_error:.2f}"
    return f"{points(versus.difference)}{error}{VERDICTS[versus.verdict]}"


VERDICTS = {1: " ▲", 0: "", -1: " ▼"}


def block_title(block: Block) -> str:
    """``r = 8``, or a phrase where no method has budgets."""
    return "No budget" if block.budget is None else f"r = {block.budget}"


def caption(facts: Facts, found: Sequence[Block]) -> list[str]:
    """Sentences that let a table stand alone: task, model, L, clients, seeds, rounds, base, overrides, run.

    Args:
        facts: facts of the run.
        found: the blocks of one pool, at least one.
    """
    block = found[0]
    clients = counted(block.n_clients, "client")
    seeds = ", ".join(str(seed) for seed in block.seeds)
    spread = "mean (SD) over seeds" if len(block.seeds) > 1 else "one seed, so no SD (–)"
    changed = "; ".join(f"{o.key}: {o.default} → {o.value}" for o in facts.overrides)
    return [
        f"Accuracy in percent on {pool_name(block.pool).lower()}: {spread}; best in bold.",
        f"Task {facts.task}, model {facts.model} with L = {facts.n_modules} adapted layers, budget rL ranks; "
        f"{clients} in {counted(len(block.languages), 'language')}; seeds {seeds}.",
        f"Base model: {facts.base}, {rounds(facts.base_rounds)}; strategies: {rounds(facts.strategy_rounds)}.",
        "A language is pooled over its clients; Average weighs languages equally; Wins counts languages, "
        "ties for each.",
        f"Δ {method_name(REFERENCE)}: paired difference per client in points, mean ± standard error over "
        "clients; ▲ / ▼ beyond 2 standard errors.",
        f"Departures from the defaults (default → used): {changed or 'none'}.",
        f"Run {facts.run_id}"
        + ("" if facts.status == NOT_RECORDED else f" ({facts.status})")
        + f"; {facts.version_line}.",
    ]


def markdown_table(facts: Facts, found: Sequence[Block]) -> str:
    """One pool as Markdown, one block per budget, columns padded so that the source reads as well."""
    sentences = [_escape(sentence, _MARKDOWN) for sentence in caption(facts, found)]
    parts = [f"# {_escape(pool_name(found[0].pool), _MARKDOWN)}: accuracy (%)", "\n".join(sentences)]
    for block in found:
        rows = _rows(block, lambda word: _escape(word, _MARKDOWN), lambda word: f"**{word}**", " ")
        parts += [f"## {block_title(block)}", _pipes(rows)]
    return "\n\n".join(parts) + "\n"


def latex_table(facts: Facts, found: Sequence[Block]) -> str:
    """One pool in LaTeX (booktabs), never wider than the text.

    Two budgets stand side by side where they fit, upright or sideways; long tables take several floats.
    """
    sentences = " ".join(_escape(sentence, _LATEX) for sentence in caption(facts, found))
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
    same = all((b.languages, bool(b.versus)) == (found[0].languages, bool(found[0].versus)) for b in found)
    return [_panel(found)] if same else [_panel([block]) for block in found]


def _panel(found: Sequence[Block]) -> str:
    columns = [
        _rows(block, lambda word: _escape(word, _LATEX), lambda word: rf"\textbf{{{word}}}", r"\,") for block in found
    ]
    names, titles, rules, at = columns[0], [], [], 2
    for block, rows in zip(found, columns, strict=True):
        n = len(rows[0]) - 1
        titles.append(rf"\multicolumn{{{n}}}{{c}}{{{_escape(block_title(block), _LATEX).replace('r =', '$r$ =')}}}")
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

    rows = [["Language", *(escape(method_name(m)) for m in block.methods)]]
    for code in block.languages:
        name = language_name(code)
        label = escape(name if name == code else f"{name} ({code})")
        rows.append([label, *(show(block.cells.get((code, m))) for m in block.methods)])
    for label, values in _summary_rows(block):
        top = [value for value in values if isinstance(value, int)]
        cells = [
            bold(str(v)) if isinstance(v, int) and v == max(top) else show(v) if isinstance(v, Cell) else escape(str(v))
            for v in values
        ]
        rows.append([escape(label), *cells])
    return rows


def _summary_rows(block: Block) -> list[tuple[str, list[Cell | int | str]]]:
    rows: list[tuple[str, list[Cell | int | str]]] = [
        ("Average", [block.average[m] for m in block.methods]),
        ("Wins", [block.wins[m] for m in block.methods]),
    ]
    if block.versus:
        rows.append((f"Δ {method_name(REFERENCE)}", [versus_text(block.versus.get(m)) for m in block.methods]))
    return rows


def _pipes(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(3, *(len(row[k]) for row in rows)) for k in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cells[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([line(rows[0]), line(rule), *(line(row) for row in rows[1:])])


def _escape(word: str, rules: dict[str, str]) -> str:
    return "".join(rules.get(letter, letter) for letter in word)


def file_label(pool: str) -> str:
    """A pool as part of a file name."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in pool) or "all"
