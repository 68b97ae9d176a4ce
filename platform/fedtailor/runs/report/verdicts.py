"""The paired comparisons in words and as tables in Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedtailor.runs.report.markup import LATEX, MARKDOWN, escape, pipes
from fedtailor.runs.report.metrics import ACCURACY, Measure
from fedtailor.runs.report.names import in_method_order, in_pool_order, method_name, pool_name
from fedtailor.runs.report.significance import Pair, Verdict, rule
from fedtailor.runs.report.tables import ABSENT, file_label, points

MARKS: Mapping[Verdict, str] = {"better": "▲", "undecided": "", "worse": "▼"}
Key = tuple[str, str]


def p_text(p: float | None) -> str:
    """A p-value as printed, ``<0.001`` below that.

    >>> p_text(0.04123), p_text(0.00001), p_text(None)
    ('0.041', '<0.001', '–')
    """
    if p is None:
        return ABSENT
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def interval_text(pair: Pair) -> str:
    """``[+0.40, +2.06]`` in points."""
    return ABSENT if pair.interval is None else f"[{points(pair.interval[0])}, {points(pair.interval[1])}]"


def pair_title(key: Key) -> str:
    """``FedP²EFT – LoRA``, the order of the subtraction."""
    return f"{method_name(key[0])} – {method_name(key[1])}"


def budget_title(budget: int | None) -> str:
    """``r = 8``, or a phrase where no method has budgets."""
    return "No budget" if budget is None else f"r = {budget}"


def grid(pairs: Sequence[Pair], pool: str) -> tuple[list[int | None], dict[Key, dict[int | None, Pair]]]:
    """Budgets, and for each (method, other) the comparison at each budget."""
    here = [pair for pair in pairs if pair.pool == pool]
    budgets = sorted({pair.budget for pair in here}, key=lambda r: -1 if r is None else r)
    rows: dict[Key, dict[int | None, Pair]] = {}
    for pair in here:
        rows.setdefault((pair.method, pair.other), {})[pair.budget] = pair
    order = in_method_order(name for key in rows for name in key)
    return budgets, dict(sorted(rows.items(), key=lambda row: tuple(map(order.index, row[0]))))


def sentences(pairs: Sequence[Pair], pool: str) -> list[str]:
    """A sentence per method of a pool: against whom it is better, worse or undecided, and at which budgets."""
    _, rows = grid(pairs, pool)
    found = []
    for method in reversed(in_method_order(key[0] for key in rows)):
        parts = []
        for verdict, words in (("better", "better than"), ("worse", "worse than"), ("undecided", "undecided against")):
            whom = [
                f"{method_name(other)}{_where(at, verdict)}"
                for (one, other), at in rows.items()
                if one == method and any(pair.verdict == verdict for pair in at.values())
            ]
            parts += [f"{words} {', '.join(whom)}"] if whom else []
        found.append(f"{method_name(method)}: {'; '.join(parts)}.")
    return found


def _where(at: Mapping[int | None, Pair], verdict: str) -> str:
    hits = [str(budget) for budget, pair in at.items() if pair.verdict == verdict and budget is not None]
    if not hits or len(hits) == len(at):
        return ""
    return f" (r = {', '.join(hits)})"


def markdown(pairs: Sequence[Pair], scale: str = "", measure: Measure = ACCURACY) -> str:
    """``significance.md``: a table per pool, a row per pair, a column per budget.

    Args:
        pairs: all comparisons.
        scale: a sentence on a run that was made smaller.
        measure: what is compared.
    """
    parts = ["# Paired comparisons over clients", escape(_caption(scale, measure), MARKDOWN)]
    for pool in in_pool_order(pair.pool for pair in pairs):
        budgets, rows = grid(pairs, pool)
        body = [["Pair", *(escape(budget_title(b), MARKDOWN) for b in budgets)]]
        body += [
            [escape(pair_title(key), MARKDOWN), *(escape(_cell(at.get(b)), MARKDOWN) for b in budgets)]
            for key, at in rows.items()
        ]
        words = "\n".join(f"- {escape(sentence, MARKDOWN)}" for sentence in sentences(pairs, pool))
        parts += [f"## {escape(pool_name(pool), MARKDOWN)} ({_clients(pairs, pool)})", pipes(body), words]
    return "\n\n".join(parts) + "\n"


def latex(pairs: Sequence[Pair], scale: str = "", measure: Measure = ACCURACY) -> str:
    """``significance.tex`` (booktabs): a float per pool; arguments as in `markdown`."""
    floats = [r"% needs \usepackage[utf8]{inputenc} and the packages amssymb, booktabs, graphicx"]
    for pool in in_pool_order(pair.pool for pair in pairs):
        budgets, rows = grid(pairs, pool)
        titles = [escape(budget_title(b), LATEX).replace("r =", "$r$ =") for b in budgets]
        body = [
            " & ".join([escape(pair_title(key), LATEX), *(escape(_cell(at.get(b)), LATEX) for b in budgets)]) + r" \\"
            for key, at in rows.items()
        ]
        words = escape(f"{pool_name(pool)} ({_clients(pairs, pool)}). {_caption(scale, measure)}", LATEX)
        floats.append("\n".join([
            r"\begin{table*}[p]", r"\centering\scriptsize",
            rf"\caption{{{words}}}\label{{tab:pairs-{file_label(pool)}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * len(budgets)}}}", r"\toprule", " & ".join(["", *titles]) + r" \\",
            r"\midrule", *body, r"\bottomrule", r"\end{tabular}}", r"\end{table*}",
        ]))  # fmt: skip
    return "\n\n".join(floats) + "\n"


def _caption(scale: str, measure: Measure) -> str:
    lead = (
        f"Mean difference in {measure.phrase} (points), its 95 % interval, and the corrected p; ▲ better, ▼ worse, no "
        "mark undecided."
    )
    return " ".join(part for part in (lead, scale, rule(measure)) if part)


def _clients(pairs: Sequence[Pair], pool: str) -> str:
    counts = sorted({pair.n_clients for pair in pairs if pair.pool == pool})
    return f"{counts[0]} clients" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} clients"


def _cell(pair: Pair | None) -> str:
    if pair is None:
        return ABSENT
    mark = MARKS[pair.verdict]
    return f"{points(pair.difference)}{f' {mark}' if mark else ''} {interval_text(pair)} p {p_text(pair.p_holm)}"
