"""What rank clients' adapters came to, beside how mixed their labels are: a figure, a table, and their numbers.

Methods report the singular values of what a client's model adds to each module; workers commit what two rules make of
them (`adapters.spectrum`), so that every run has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy.stats import entropy

from fedtailor.report import style
from fedtailor.report.grid import Grid
from fedtailor.report.names import ABSENT, budget_title, in_method_order, method_name
from fedtailor.report.style import Drawing, Look, Missing, looks

TITLE = "Learned ranks"
RULES: Final[Mapping[str, str]] = {"rank90": "Rank90", "entropy_rank": "Entropy rank"}
ENTROPY: Final = "label_entropy"

_LANE = ["method", "budget", "pool", "seed", "client"]
_WHAT = (
    "Rank90 of what a client's model adds to one module (B A; of PF²LoRA B A + D C) is the smallest number of its "
    "largest singular values that make up 90 % of the sum of all. The rule depends on the spectrum: directions whose "
    "singular values are small do not count, however many were learned, and scaling one of them changes it. Entropy "
    "rank is the exponential of the entropy of the singular values as shares of their sum."
)
_LABELS = "Label entropy (nats): 0 where all of a client's training texts have one label."


def learned_ranks(frame: pd.DataFrame, class_counts: Mapping[int, Mapping[str, Sequence[int]]]) -> pd.DataFrame:
    """Method, budget, pool, seed, client, module, then `RULES` and `ENTROPY` (NaN where unknown), a row per module.

    Args:
        frame: checked metric rows.
        class_counts: seed to client to number of train texts per class.
    """
    keys = [*_LANE, "module"]
    rows = frame[(frame["stage"] == "personalise") & frame["metric"].isin(RULES) & (frame["module"] != "")]
    wide = rows.pivot_table(index=keys, columns="metric", values="value").reindex(columns=list(RULES)).reset_index()
    known = {(seed, client): entropy(n) for seed, of in class_counts.items() for client, n in of.items() if sum(n)}
    wide[ENTROPY] = [known.get(place, np.nan) for place in zip(wide["seed"], wide["client"], strict=True)]
    return wide.rename_axis(columns=None)


def _groups(table: pd.DataFrame) -> list[tuple[str, int]]:
    """Methods in their order, each with its budgets."""
    budgets = table.groupby("method")["budget"].unique()
    return [(method, int(r)) for method in in_method_order(budgets.index) for r in sorted(budgets[method])]


def _title(name: str, budget: int) -> str:
    return name if budget < 0 else f"{name}, {budget_title(budget)}"


def ranks_figure(table: pd.DataFrame) -> list[Drawing | Missing]:
    """A column of panels per method, a row per rule; nothing where no method reports what it adds.

    Args:
        table: of `learned_ranks`.
    """
    if not len(table):
        return []
    if table[ENTROPY].isna().all():
        return [Missing(TITLE, "the run folder does not say which labels its clients have")]
    groups, look = _groups(table), looks(table["method"])
    n = len(groups)
    figure, axes = style.panels(2 * n, n, max(1.0 + 2.6 * n, 4.4), 2.7, sharex=True)
    for k, (axis, (rule, (method, budget))) in enumerate(zip(axes, product(RULES, groups), strict=True)):
        own = table[(table["method"] == method) & (table["budget"] == budget)]
        _panel(axis, own, rule, look[method])
        axis.set_ylim(0, 1.08 * table[rule].max() or 1.0)
        if k < n:
            axis.set_title(_title(look[method].label, budget))
        else:
            axis.set_xlabel("label entropy (nats)")
        if k % n == 0:
            axis.set_ylabel(RULES[rule].lower())
    unseen = " (open: unseen clients)" if (table["pool"] == "unseen").any() else ""
    marks = f"Each client at its label entropy: small marks are its modules, the large one is their mean{unseen}."
    caption = f"{marks} {_WHAT} {_LABELS}"
    return [Drawing("learned_ranks", TITLE, caption, figure)]


def _panel(axis: Axes, rows: pd.DataFrame, rule: str, look: Look) -> None:
    axis.plot(rows[ENTROPY], rows[rule], "o", color=look.colour, alpha=0.35, markersize=3, markeredgewidth=0)
    for pool, clients in rows.groupby("pool"):
        means = clients.groupby(_LANE)[[ENTROPY, rule]].mean()
        inside, edge = ("white", look.colour) if pool == "unseen" else (look.colour, "white")
        axis.plot(
            means[ENTROPY], means[rule], look.marker, color=inside, markersize=6.5, markeredgecolor=edge,
            markeredgewidth=0.6,
        )  # fmt: skip
    axis.margins(x=0.08)
    axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def ranks_grid(table: pd.DataFrame) -> Grid:
    """``learned_ranks``: a row per method and budget.

    Args:
        table: of `learned_ranks`, at least one row.
    """
    cells = []
    for method, budget in _groups(table):
        own = table[(table["method"] == method) & (table["budget"] == budget)]
        means = own.groupby(_LANE)[[ENTROPY, *RULES]].mean()
        row = [_title(method_name(method), budget), str(own["client"].nunique())]
        for rule in RULES:
            low, high = own[rule].min(), own[rule].max()
            row += [f"{means[rule].mean():.2f}", f"{low:.3g} to {high:.3g}", _correlation(means, rule)]
        cells.append(row)
    parts = ("mean", "least to most", "correlation")
    return Grid(
        header=["Method", "Clients", *(f"{title}, {part}" for title in RULES.values() for part in parts)],
        rows=cells,
        caption=[
            _WHAT,
            "Mean over modules, clients and seeds; least and most of all modules and clients. Correlation: Spearman's, "
            "of a client's mean over modules with its label entropy, mean over seeds.",
            _LABELS,
        ],
        title=TITLE,
        label="learned-ranks",
    )


def _correlation(means: pd.DataFrame, rule: str) -> str:
    """Over clients, within each seed; `ABSENT` where clients do not differ in one of the two."""
    found: list[Any] = []
    for _, rows in means.groupby("seed"):
        if rows[rule].round(9).nunique() > 1 and rows[ENTROPY].round(9).nunique() > 1:
            found.append(rows[rule].corr(rows[ENTROPY], method="spearman"))
    return f"{np.mean(found):+.2f}".replace("-", "−") if found else ABSENT
