"""Scores against the budget, a line per run and method: colour tells the method, dashes and marker the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedtailor.report.compare_tables import Line, PoolTable
from fedtailor.report.curves import PERCENT
from fedtailor.report.fonts import drawable
from fedtailor.report.metrics import ACCURACY, Measure
from fedtailor.report.names import method_name, pool_name, shortened
from fedtailor.report.significance import NOT_COMPARED
from fedtailor.report.style import INK, MUTED, Drawing, Look, looks

NAME = "compare"

_MARKERS = "os^DvPX*"

_DASHES: tuple[tuple[int, tuple[float, ...]], ...] = (
    (0, ()), (0, (5, 2)), (0, (1, 1.4)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (9, 3)),
)  # fmt: skip

_LONGEST = 44


def draw(run_ids: Sequence[str], tables: Sequence[PoolTable], measure: Measure = ACCURACY) -> Drawing:
    """A panel per pool; with fewer than two budgets, methods take their place on the axis.

    Args:
        run_ids: names for the legend, in order.
        tables: one per pool, at least one.
        measure: what they show.
    """
    shown = {line.method for table in tables for line in table.lines}
    hidden = shown & set(NOT_COMPARED) if shown - set(NOT_COMPARED) else set()
    look = looks(shown - hidden)
    curves = len(tables[0].budgets) > 1
    figure = Figure(figsize=(0.6 + 5.6 * max(len(tables), 1), 5.0))
    axes = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for axis, table in zip(axes, tables, strict=True):
        lines = [line for line in table.lines if line.method in look]
        (_curves if curves else _points)(axis, table, lines, look, len(run_ids))
        axis.set_title(pool_name(table.pool))
        axis.yaxis.set_major_formatter(PERCENT)
        axis.tick_params(labelleft=True)
    axes[0].set_ylabel(f"{measure.phrase}, {measure.mean}")
    _legends(figure, run_ids, look if curves else {}, curves)
    return Drawing(NAME, f"{measure.title} of the runs", _caption(tables, hidden, curves, measure), figure)


def _curves(axis: Axes, table: PoolTable, lines: Sequence[Line], look: Mapping[str, Look], n_runs: int) -> None:
    order = [method for method in look if any(line.method == method and not line.flat for line in lines)]
    for line in lines:
        at = [k for k, budget in enumerate(table.budgets) if budget in line.cells]
        # Error bars of close lines stay apart: runs of a method together, methods beside each other.
        place = 0 if line.flat else order.index(line.method) * n_runs + line.run
        shift = 0.0 if line.flat else 0.6 * ((place + 0.5) / (len(order) * n_runs) - 0.5)
        x = [at[0] - 0.4, *at[1:-1], at[-1] + 0.4] if line.flat else [k + shift for k in at]
        _line(axis, x, [table.budgets[k] for k in at], line, look[line.method])
    axis.set_xticks(range(len(table.budgets)), [str(budget) for budget in table.budgets])
    axis.set_xlabel("budget r (ranks per adapted layer)")
    axis.set_xlim(-0.5, len(table.budgets) - 0.5)


def _line(axis: Axes, x: Sequence[float], budgets: Sequence[int | None], line: Line, look: Look) -> None:
    y = np.array([line.cells[budget].mean for budget in budgets])
    sd = np.array([line.cells[budget].sd or 0.0 for budget in budgets])
    dashes, marker = _style(line.run)
    # A method without budgets is a thin level line.
    axis.plot(
        x, y, color=look.colour, linestyle=dashes, linewidth=1.0 if line.flat else 1.5, alpha=0.75 if line.flat else 1,
        marker="none" if line.flat else marker, markersize=5.5, markeredgecolor="white", markeredgewidth=0.5, zorder=3,
    )  # fmt: skip
    if not line.flat and sd.any():
        axis.errorbar(x, y, yerr=sd, fmt="none", ecolor=look.colour, elinewidth=1.0, capsize=2, alpha=0.8, zorder=2)


def _points(axis: Axes, table: PoolTable, lines: Sequence[Line], look: Mapping[str, Look], n_runs: int) -> None:
    order, (budget,) = list(look), table.budgets
    for line in lines:
        cell = line.cells[budget]
        x = order.index(line.method) + 0.5 * ((line.run + 0.5) / n_runs - 0.5)
        colour, marker = look[line.method].colour, _style(line.run)[1]
        axis.errorbar(
            [x], [cell.mean], yerr=[cell.sd or 0.0], fmt=marker, color=colour, markersize=7, elinewidth=1.2,
            capsize=2.5 if cell.sd else 0, markeredgecolor="white", markeredgewidth=0.5,
        )  # fmt: skip
    axis.set_xticks(range(len(order)), [look[method].label.replace("-", "-\n") for method in order])
    axis.set_xlim(-0.5, len(order) - 0.5)
    axis.grid(False, axis="x")
    if budget is not None:
        axis.set_xlabel(f"r = {budget}")


def _style(run: int) -> tuple[tuple[int, tuple[float, ...]], str]:
    return _DASHES[run % len(_DASHES)], _MARKERS[run % len(_MARKERS)]


def _legends(figure: Figure, run_ids: Sequence[str], look: Mapping[str, Look], curves: bool) -> None:
    names = [shortened(drawable(name), _LONGEST) for name in run_ids]
    runs = [
        Line2D(
            [], [], color=MUTED, label=name, linestyle=_style(k)[0] if curves else "none", marker=_style(k)[1],
            markersize=6, markeredgecolor="white", markeredgewidth=0.5, linewidth=1.5,
        )
        for k, name in enumerate(names)
    ]  # fmt: skip
    columns = max(1, min(len(runs), 120 // (max(map(len, names)) + 8)))
    figure.legend(
        handles=runs, loc="outside upper left", ncols=columns, columnspacing=1.6, handlelength=3.2, labelcolor=INK
    )
    if look:
        methods = [Line2D([], [], color=s.colour, linewidth=3.5, label=s.label) for s in look.values()]
        figure.legend(handles=methods, loc="outside lower left", ncols=min(len(methods), 7), columnspacing=1.4,
                      handlelength=1.3)  # fmt: skip


def _caption(tables: Sequence[PoolTable], hidden: set[str], curves: bool, measure: Measure) -> str:
    several = max(line.seeds for table in tables for line in table.lines) > 1
    flat = any(line.flat for table in tables for line in table.lines if line.method not in hidden)
    floor = f" {', '.join(sorted(map(method_name, hidden)))} is in the table only." if hidden else ""
    return (
        ("Colour: method; dashes and marker: run. " if curves else "Marker: run. ")
        + f"{measure.mean.capitalize()}, then over seeds"
        + ("; error bars: ± SD over seeds" if several else "; one seed, so no error bars")
        + ("; thin lines without markers: methods without a budget" if curves and flat else "")
        + "."
        + floor
    )
