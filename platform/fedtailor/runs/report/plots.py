"""Accuracy per language, accuracy against the budget, and curves over rounds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedtailor.runs.report.names import (
    in_method_order,
    in_pool_order,
    language_label,
    method_name,
    metric_name,
    pool_name,
)
from fedtailor.runs.report.results import Block, client_accuracy
from fedtailor.runs.report.style import GRID, INK, MUTED, Drawing, Look, Missing, looks, plain

LANGUAGES, BUDGETS, CURVES = "Accuracy per language", "Accuracy against the budget", "Training curves"
PERCENT = FuncFormatter(lambda value, position: f"{100 * value:g}%")
_FLAT = ("majority", "base")


def per_language(found: Sequence[Block]) -> list[Drawing | Missing]:
    """One figure per pool, a panel per budget: a row per language, a mark per method."""
    if not found:
        return [Missing(LANGUAGES, "no personalised client was tested")]
    return [_language_figure([b for b in found if b.pool == pool]) for pool in in_pool_order(b.pool for b in found)]


def _language_figure(found: Sequence[Block]) -> Drawing:
    codes = sorted({code for block in found for code in block.languages})
    means = {code: [cell.mean for b in found for (name, _), cell in b.cells.items() if name == code] for code in codes}
    codes = sorted(codes, key=lambda code: (np.mean(means[code]), code))
    look = looks(m for block in found for m in block.methods)
    columns = min(len(found), 4)
    rows = -(-len(found) // columns)
    height = max(0.34, 0.045 * len(look) + 0.06) * len(codes) + 0.9
    figure = Figure(figsize=(1.8 + 2.75 * columns if columns > 1 else 7.5, height * rows + 0.5))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat[len(found) :]:
        axis.remove()
    for axis, block in zip(axes.flat, found, strict=False):
        _language_panel(axis, block, codes, look)
        axis.set_title("" if block.budget is None else f"r = {block.budget}")
    names = [language_label(code) for code in codes]
    axes[0, 0].set_yticks(range(len(codes)), names)
    axes[0, 0].set_ylim(-0.6, len(codes) - 0.4)
    _legend(figure, look)
    pool, several = found[0].pool, len(found[0].seeds) > 1
    return Drawing(
        f"accuracy_per_language_{''.join(c for c in pool if c.isalnum()) or 'all'}",
        f"{LANGUAGES}: {pool_name(pool).lower()}",
        "Accuracy pooled over a language's clients, mean over seeds"
        + (", bars: ± SD over seeds" if several else "")
        + ". Languages are sorted by their mean over all methods.",
        figure,
    )  # fmt: skip


def _language_panel(axis: Axes, block: Block, codes: list[str], look: dict[str, Look]) -> None:
    for y in range(1, len(codes), 2):
        axis.axhspan(y - 0.5, y + 0.5, color=GRID, alpha=0.35, linewidth=0, zorder=0)
    moved = [m for m in look if m not in _FLAT] or list(look)
    for method in block.methods:
        style, cells = (
            look[method],
            [(y, block.cells[code, method]) for y, code in enumerate(codes) if (code, method) in block.cells],
        )
        # Methods of close accuracy stay apart: each has its own height within the row.
        shift = 0.0 if method not in moved else 0.5 * (0.5 - (moved.index(method) + 0.5) / len(moved))
        x, at = [cell.mean for _, cell in cells], [y + shift for y, _ in cells]
        spread = [cell.sd or 0.0 for _, cell in cells]
        if any(spread):
            axis.errorbar(x, at, xerr=spread, fmt="none", ecolor=style.colour, alpha=0.45, elinewidth=1, zorder=2)
        axis.plot(
            x, at, style.marker, color=style.colour, markersize=13 if style.marker == "|" else 5.2,
            markeredgewidth={"|": 2.0, "x": 1.2}.get(style.marker, 0.4),
            markeredgecolor=style.colour if style.marker in "x|" else "white", zorder=3,
        )  # fmt: skip
    axis.xaxis.set_major_formatter(PERCENT)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.tick_params(labelbottom=True, axis="x")
    axis.tick_params(axis="y", length=0)
    axis.grid(False, axis="y")
    axis.spines["left"].set_visible(False)


def per_budget(found: Sequence[Block], scored: pd.DataFrame) -> list[Drawing | Missing]:
    """A panel per pool: mean over languages against the budget, band of one standard error over clients."""
    budgets = sorted({b.budget for b in found if b.budget is not None})
    if len(budgets) < 2:
        return [Missing(BUDGETS, "needs two budgets or more")]
    look = looks(m for block in found for m in block.methods)
    pools = in_pool_order(block.pool for block in found)
    errors = _client_errors(scored)
    flat = {method for _, method, budget in errors if budget == -1}
    figure = Figure(figsize=(5.6 * len(pools), 4.1))
    axes = figure.subplots(1, len(pools), squeeze=False, sharey=True)[0]
    for axis, pool in zip(axes, pools, strict=True):
        here = [b for b in found if b.pool == pool and b.budget is not None]
        for method, style in look.items():
            _budget_line(axis, [b for b in here if method in b.average], budgets, method, style, errors)
        axis.set_title(pool_name(pool))
        axis.set_xticks(range(len(budgets)), [str(b) for b in budgets])
        axis.set_xlabel("budget r (ranks per adapted layer)")
        axis.yaxis.set_major_formatter(PERCENT)
        axis.tick_params(labelleft=True)
    axes[0].set_ylabel("accuracy, mean over languages")
    _legend(figure, look, dashed=flat)
    caption = (
        "Mean over languages and seeds; band: one standard error over clients (their accuracies averaged "
        "over seeds). Dashed: methods without a budget. The spread between clients is wide because languages "
        "differ; use the paired comparison of the tables to tell methods apart."
    )
    return [Drawing("accuracy_vs_budget", BUDGETS, caption, figure)]


def _budget_line(
    axis: Axes, here: Sequence[Block], budgets: list[int], method: str, style: Look,
    errors: Mapping[tuple[str, str, int], float],
) -> None:  # fmt: skip
    points = [(budgets.index(b.budget), b) for b in here if b.budget is not None]
    x, y = [at for at, _ in points], np.array([b.average[method].mean for _, b in points])
    flat = any((b.pool, method, -1) in errors for b in here)
    band = np.array([errors.get((b.pool, method, -1 if flat else b.budget or -1), 0.0) for _, b in points])
    axis.plot(
        x, y, "--" if flat else "-", color=style.colour, marker="none" if flat else style.marker,
        markersize=6, markeredgecolor="white", markeredgewidth=0.6, label=style.label,
    )  # fmt: skip
    axis.fill_between(x, y - band, y + band, color=style.colour, alpha=0.13, linewidth=0)


def _client_errors(scored: pd.DataFrame) -> dict[tuple[str, str, int], float]:
    clients = client_accuracy(scored[scored["metric"] == "accuracy"])
    means = clients.groupby(["pool", "method", "budget", "client"])["value"].mean()
    errors = means.groupby(level=["pool", "method", "budget"]).sem().fillna(0.0)
    table = errors.rename("error").reset_index()
    rows = zip(table["pool"], table["method"], table["budget"], table["error"], strict=True)
    return {(str(p), str(m), int(b)): float(v) for p, m, b, v in rows}


def curves(frame: pd.DataFrame) -> list[Drawing | Missing]:
    """A panel per (stage, method, metric) of the round stages: mean over clients, band over seeds."""
    series = round_means(frame)
    if not len(series):
        return [Missing(CURVES, "this run trained no rounds")]
    panels = [
        (stage, method, metric)
        for stage in ("base", "strategy")
        for method in in_method_order(series.loc[series["stage"] == stage, "method"])
        for metric in _curve_order(series[(series["stage"] == stage) & (series["method"] == method)])
    ]
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(4.1 * columns, 2.75 * height))
    axes = figure.subplots(height, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    look = looks(series["method"])
    for axis, (stage, method, metric) in zip(axes.flat, panels, strict=False):
        chosen = (series["stage"] == stage) & (series["method"] == method) & (series["metric"] == metric)
        _curve_panel(axis, series[chosen], look[method].colour if stage == "strategy" else INK)
        axis.set_title(metric_name(metric), pad=18)
        whose = f"{'base model' if stage == 'base' else 'strategy'}, {method_name(method)}"
        axis.text(0, 1.025, whose, transform=axis.transAxes, color=MUTED, fontsize=8.5)
    several = series["seed"].nunique() > 1
    seeds = "; line: mean over seeds, band: ± SD over seeds." if several else "; one seed."
    caption = f"Mean over the clients of a round, weighted by their examples{seeds}"
    return [Drawing("training_curves", CURVES, caption, figure)]


def round_means(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean over a round's clients, weighted by ``weight``: stage, method, metric, seed, round, value."""
    trained = frame["stage"].isin(["base", "strategy"]) & (frame["module"] == "")
    rows = frame[trained & np.isfinite(frame["value"])]
    keys = ["stage", "method", "metric", "seed", "round"]
    # Weight 0 everywhere means that the metric has no examples behind it: plain mean.
    weight = rows["weight"].where(rows.groupby(keys)["weight"].transform("sum") > 0, 1.0)
    sums = rows.assign(weight=weight, total=rows["value"] * weight).groupby(keys)[["total", "weight"]].sum()
    means: pd.DataFrame = sums.assign(value=sums["total"] / sums["weight"])[["value"]].reset_index()
    return means


def _curve_order(series: pd.DataFrame) -> list[str]:
    first = ("train_loss", "psg_loss")
    return sorted(set(series["metric"]), key=lambda name: (first.index(name) if name in first else len(first), name))


def _curve_panel(axis: Axes, series: pd.DataFrame, colour: str) -> None:
    table = series.pivot_table(index="round", columns="seed", values="value")
    mean, x = table.mean(axis=1).to_numpy(), table.index.to_numpy() + 1
    axis.plot(x, mean, color=colour, linewidth=1.6, marker="o" if len(x) == 1 else None)
    if table.shape[1] > 1:
        spread = table.std(axis=1).fillna(0.0).to_numpy()
        axis.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
    # Positive numbers over more than a decade and a half read better on a log scale.
    if mean.min() > 0 and mean.max() > 30 * mean.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(plain))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_xlim(x[0] - 0.03 * len(x), x[-1] + 0.03 * len(x))
    axis.set_xlabel("round")


def _legend(figure: Figure, look: dict[str, Look], dashed: Collection[str] | None = None) -> None:
    handles = [
        Line2D(
            [], [], color=s.colour, label=s.label, markeredgecolor=s.colour if s.marker in "x|" else "white",
            marker="none" if dashed and m in dashed else s.marker, markersize=10 if s.marker == "|" else 7,
            markeredgewidth=2 if s.marker in "x|" else 0.5,
            linestyle="none" if dashed is None else "--" if m in dashed else "-",
        )
        for m, s in look.items()
    ]  # fmt: skip
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=min(len(handles), 8),
        columnspacing=1.4,
        handletextpad=0.4,
    )
