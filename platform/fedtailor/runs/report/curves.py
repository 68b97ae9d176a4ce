"""Training curves over rounds: the base model, and each method's strategy, with bands over seeds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedtailor.runs.report.fonts import drawable
from fedtailor.runs.report.names import in_method_order, metric_name
from fedtailor.runs.report.setting import BASES
from fedtailor.runs.report.style import INK, Drawing, Look, Missing, looks, plain

CURVES = "Training curves"
_FIRST = ("train_loss", "psg_loss")
_KEYS = ["stage", "method", "budget", "metric", "seed", "round"]
_COLUMNS = 3


def curves(frame: pd.DataFrame) -> list[Drawing | Missing]:
    """A figure per round stage and method, a panel per metric: mean over clients, a line per budget.

    Args:
        frame: checked metric rows.
    """
    series = round_means(frame)
    if not len(series):
        return [Missing(CURVES, "this run trained no rounds")]
    look = looks(series["method"])
    return [
        _figure(stage, look[method], method, series[(series["stage"] == stage) & (series["method"] == method)])
        for stage in ("base", "strategy")
        for method in in_method_order(series.loc[series["stage"] == stage, "method"])
    ]


def round_means(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean over a round's clients, weighted by ``weight``: stage, method, budget, metric, seed, round, value."""
    trained = frame["stage"].isin(["base", "strategy"]) & (frame["module"] == "")
    rows = frame[trained & np.isfinite(frame["value"])]
    # Weight 0 everywhere means that the metric has no examples behind it: plain mean.
    weight = rows["weight"].where(rows.groupby(_KEYS)["weight"].transform("sum") > 0, 1.0)
    sums = rows.assign(weight=weight, total=rows["value"] * weight).groupby(_KEYS)[["total", "weight"]].sum()
    means: pd.DataFrame = sums.assign(value=sums["total"] / sums["weight"])[["value"]].reset_index()
    return means


def _figure(stage: str, look: Look, method: str, series: pd.DataFrame) -> Drawing:
    found = set(series["metric"])
    metrics = [name for name in _FIRST if name in found] + sorted(found - set(_FIRST))
    budgets = sorted(set(series["budget"]))
    # Methods that train one strategy per budget: a shade each, light to dark.
    shades = sns.color_palette("viridis_r", len(budgets) + 1).as_hex()[1:]
    one = INK if stage == "base" else look.colour
    colours = dict(zip(budgets, shades if len(budgets) > 1 else [one], strict=True))
    columns = min(_COLUMNS, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(4.1 * max(columns, 2 if len(budgets) > 1 else 1), 2.6 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(metrics) :]:
        axis.remove()
    for axis, metric in zip(axes.flat, metrics, strict=False):
        _panel(axis, series[series["metric"] == metric], colours)
        axis.set_title(drawable(metric_name(metric)))
    if len(budgets) > 1:
        handles = axes.flat[0].get_legend_handles_labels()[0]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    whose = f"base model, {BASES.get(method, look.label)}" if stage == "base" else f"strategy of {look.label}"
    several = series["seed"].nunique() > 1
    return Drawing(
        f"training_curves_{stage}_{''.join(c if c.isalnum() else '_' for c in method)}",
        f"{CURVES}: {whose}",
        "Mean over the clients of a round, weighted by their examples; "
        + ("line: mean over seeds, band: ± SD over seeds" if several else "one seed")
        + (", a line per budget" if len(budgets) > 1 else "")
        + ". Cohorts differ from round to round, so single rounds are noisy.",
        figure,
    )


def _panel(axis: Axes, series: pd.DataFrame, colours: dict[int, str]) -> None:
    low, high, last = np.inf, -np.inf, 1
    for budget, rows in series.groupby("budget"):
        table = rows.pivot_table(index="round", columns="seed", values="value")
        mean, x = table.mean(axis=1).to_numpy(), table.index.to_numpy() + 1
        colour = colours[int(str(budget))]
        single = len(x) == 1
        axis.plot(x, mean, color=colour, linewidth=1.5, marker="o" if single else None, label=f"r = {budget}")
        if table.shape[1] > 1:
            spread = table.std(axis=1).fillna(0.0).to_numpy()
            axis.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
        low, high, last = min(low, mean.min()), max(high, mean.max()), max(last, int(x[-1]))
    # Positive numbers over more than a decade and a half read better on a log scale.
    if low > 0 and high > 30 * low:
        axis.set_yscale("log")
        axis.set_ylim(low / 1.3, high * 1.3)
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
        axis.yaxis.set_major_formatter(FuncFormatter(plain))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_xlim(1 - 0.03 * last, last + 0.03 * last)
    axis.set_xlabel("round")
