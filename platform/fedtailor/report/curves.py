"""Lines and marks: training curves over rounds, a run's measure against the budget and per language."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedtailor.report import names, style
from fedtailor.report.measures import ACCURACY, Measure
from fedtailor.report.mix_weights import WEIGHT
from fedtailor.report.scores import Block, pooled
from fedtailor.report.significance import NOT_COMPARED
from fedtailor.report.style import GRID, INK, Drawing, Look, Missing, drawable, looks

CURVES = "Training curves"
_FIRST = ("train_loss", "psg_loss")
_KEYS = ["stage", "method", "budget", "metric", "seed", "round"]
PERCENT = FuncFormatter(lambda value, position: f"{100 * value:g}%")
_FLAT = ("majority", "prior_shift", "base")


def training_curves(frame: pd.DataFrame) -> list[Drawing | Missing]:
    """A figure per round stage and method, a panel per metric: mean over clients, a line per budget.

    Args:
        frame: checked metric rows.
    """
    series = round_means(frame[~frame["metric"].str.startswith(WEIGHT)])  # a number per layer: they have a figure
    if not len(series):
        return [Missing(CURVES, "this run trained no rounds")]
    look = looks(series["method"])
    return [
        _figure(stage, look[method], method, series[(series["stage"] == stage) & (series["method"] == method)])
        for stage in ("base", "strategy")
        for method in names.in_method_order(series.loc[series["stage"] == stage, "method"])
    ]


def round_means(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean over a round's clients, weighted by ``weight``: stage, method, budget, metric, seed, round, value."""
    trained = frame["stage"].isin(["base", "strategy"]) & (frame["module"] == "")
    rows = frame[trained & np.isfinite(frame["value"])]
    # Weight 0 everywhere means that the metric has no examples behind it: plain mean.
    weight = rows["weight"].where(rows.groupby(_KEYS)["weight"].transform("sum") > 0, 1.0)
    return pooled(rows.assign(weight=weight), _KEYS).drop(columns="weight")


def _figure(stage: str, look: Look, method: str, series: pd.DataFrame) -> Drawing:
    found = set(series["metric"])
    metrics = [name for name in _FIRST if name in found] + sorted(found - set(_FIRST))
    budgets = sorted(set(series["budget"]) - {-1})
    # Methods that train one strategy per budget: a shade each, light to dark.
    shades = sns.color_palette("viridis_r", len(budgets) + 1).as_hex()[1:]
    one = INK if stage == "base" else look.colour
    colours = {-1: one} | dict(zip(budgets, shades if len(budgets) > 1 else [one] * len(budgets), strict=True))
    columns = min(3, len(metrics))
    figure, axes = style.panels(len(metrics), columns, 4.1 * max(columns, 2 if len(budgets) > 1 else 1), 2.6)
    for axis, metric in zip(axes, metrics, strict=True):
        _panel(axis, series[series["metric"] == metric], colours)
        axis.set_title(drawable(names.metric_name(metric)))
    if len(budgets) > 1:
        handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(handles=list(handles.values()), loc="outside upper left", ncols=len(handles))
    whose = f"base model, {look.label}" if stage == "base" else f"strategy of {look.label}"
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
        single, label = len(x) == 1, f"r = {budget}" if int(str(budget)) >= 0 else None
        axis.plot(x, mean, color=colour, linewidth=1.5, marker="o" if single else None, label=label)
        if table.shape[1] > 1:
            spread = table.std(axis=1).fillna(0.0).to_numpy()
            axis.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
        low, high, last = min(low, mean.min()), max(high, mean.max()), max(last, int(x[-1]))
    # Positive numbers over more than a decade and a half read better on a log scale.
    if low > 0 and high > 30 * low:
        axis.set_yscale("log")
        axis.set_ylim(low / 1.3, high * 1.3)
        style.log_ticks(axis.yaxis, numticks=6)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_xlim(1 - 0.03 * last, last + 0.03 * last)
    axis.set_xlabel("round")


def per_language(found: Sequence[Block]) -> list[Drawing | Missing]:
    """One figure per pool, a panel per budget: a row per language, a mark per method."""
    if not found:
        return [Missing(f"{ACCURACY.title} per {ACCURACY.group}", "no personalised client was tested")]
    pools = names.in_pool_order(block.pool for block in found)
    return [_language_figure([block for block in found if block.pool == pool]) for pool in pools]


def _language_figure(found: Sequence[Block]) -> Drawing:
    measure, codes = found[0].measure, sorted({code for block in found for code in block.languages})
    means = {code: [cell.mean for b in found for (name, _), cell in b.cells.items() if name == code] for code in codes}
    codes = sorted(codes, key=lambda code: (np.mean(means[code]), code))
    look, floor = _shown(found)
    columns = min(len(found), 4)
    width = 1.8 + 2.9 * columns if columns > 1 else 7.5
    height = max(0.34, 0.045 * len(look) + 0.06) * len(codes) + 0.9
    figure, axes = style.panels(len(found), columns, width, height, sharex=True, sharey=True)
    figure.set_figheight(figure.get_figheight() + 0.5)
    for axis, block in zip(axes, found, strict=True):
        _language_panel(axis, block, codes, look)
        axis.set_title("" if block.budget is None else f"r = {block.budget}")
    style.language_rows(axes[0], codes)
    _legend(figure, look)
    pool, several = found[0].pool, len(found[0].seeds) > 1
    return Drawing(
        f"{measure.name}_per_{measure.group}_{''.join(c for c in pool if c.isalnum()) or 'all'}",
        f"{measure.title} per {measure.group}: {names.pool_name(pool).lower()}",
        f"{measure.title} pooled over a {measure.group}'s {'examples' if measure.own_groups else 'clients'}, mean over "
        "seeds"
        + (", bars: ± SD over seeds" if several else "")
        + f". {measure.groups.capitalize()} are sorted by their mean over all methods.{floor}",
        figure,
    )  # fmt: skip


def without_floor(methods: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Methods that a figure shows, and the floor, which would squeeze the others and is left to the tables."""
    ordered = names.in_method_order(methods)
    others = tuple(name for name in ordered if name not in NOT_COMPARED)
    return others or ordered, tuple(name for name in ordered if others and name not in others)


def _shown(found: Sequence[Block]) -> tuple[dict[str, Look], str]:
    """Looks of the methods that a figure shows, and a sentence on those that it does not."""
    methods, hidden = without_floor(m for block in found for m in block.methods)
    return looks(methods), f" {', '.join(map(names.method_name, hidden))} is in the tables only." if hidden else ""


def _language_panel(axis: Axes, block: Block, codes: list[str], look: dict[str, Look]) -> None:
    for y in range(1, len(codes), 2):
        axis.axhspan(y - 0.5, y + 0.5, color=GRID, alpha=0.35, linewidth=0, zorder=0)
    moved = [m for m in look if m not in _FLAT] or list(look)
    for method in (m for m in block.methods if m in look):
        mark = look[method]
        cells = [(y, block.cells[code, method]) for y, code in enumerate(codes) if (code, method) in block.cells]
        # Methods of close scores stay apart: each has its own height within the row.
        shift = 0.0 if method not in moved else 0.5 * (0.5 - (moved.index(method) + 0.5) / len(moved))
        x, at = [cell.mean for _, cell in cells], [y + shift for y, _ in cells]
        spread = [cell.sd or 0.0 for _, cell in cells]
        if any(spread):
            axis.errorbar(x, at, xerr=spread, fmt="none", ecolor=mark.colour, alpha=0.45, elinewidth=1, zorder=2)
        axis.plot(
            x, at, mark.marker, color=mark.colour, markersize=13 if mark.marker == "|" else 5.2,
            markeredgewidth={"|": 2.0, "x": 1.2}.get(mark.marker, 0.4),
            markeredgecolor=mark.colour if mark.marker in "x|" else "white", zorder=3,
        )  # fmt: skip
    axis.xaxis.set_major_formatter(PERCENT)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.tick_params(labelbottom=True, axis="x")
    style.open_rows(axis)


def per_budget(found: Sequence[Block]) -> list[Drawing | Missing]:
    """A panel per pool: mean over languages against the budget, error bars of one SD over seeds."""
    measure = found[0].measure if found else ACCURACY
    title, budgets = f"{measure.title} against the budget", sorted({b.budget for b in found if b.budget is not None})
    if len(budgets) < 2:
        return [Missing(title, "needs two budgets or more")]
    look, floor = _shown(found)
    pools = names.in_pool_order(block.pool for block in found)
    flat = {m for block in found for m in block.without_budget}
    figure, axes = budget_panels(pools, budgets, measure, 4.1)
    for axis, pool in zip(axes, pools, strict=True):
        here = [b for b in found if b.pool == pool and b.budget is not None]
        for number, (method, mark) in enumerate(look.items()):
            # Error bars of close methods stay apart.
            shift = 0.0 if method in flat else 0.035 * (number - (len(look) - 1) / 2)
            _budget_line(axis, [b for b in here if method in b.average], budgets, method, mark, shift, method in flat)
    _legend(figure, look, dashed=flat)
    several = max(len(block.seeds) for block in found) > 1
    caption = (
        f"{measure.mean.capitalize()}, then over seeds"
        + ("; error bars and shaded bands: ± SD over seeds" if several else "; one seed, so no error bars")
        + ". Dashed: methods without a budget. Whether two methods differ is a matter of the paired comparisons."
        + floor
    )
    return [Drawing(f"{measure.name}_vs_budget", title, caption, figure)]


def budget_panels(
    pools: Sequence[str], budgets: Sequence[int | None], measure: Measure, height: float
) -> tuple[Figure, list[Axes]]:
    """A panel per pool with a place per budget on its x axis (None: no method has one), the measure on the y axis."""
    figure, axes = style.panels(len(pools), len(pools), 5.6 * len(pools), height, sharey=True)
    for axis, pool in zip(axes, pools, strict=True):
        axis.set_title(names.pool_name(pool))
        axis.set_xticks(range(len(budgets)), ["" if b is None else str(b) for b in budgets])
        axis.set_xlabel("" if None in budgets else "budget r (ranks per adapted layer)")
        axis.yaxis.set_major_formatter(PERCENT)
        axis.tick_params(labelleft=True)
    axes[0].set_ylabel(f"{measure.phrase}, {measure.mean}")
    return figure, axes


def _budget_line(
    axis: Axes, here: Sequence[Block], budgets: list[int], method: str, mark: Look, shift: float, flat: bool
) -> None:
    x = np.array([budgets.index(b.budget) + shift for b in here if b.budget is not None])
    y = np.array([b.average[method].mean for b in here])
    sd = np.array([b.average[method].sd or 0.0 for b in here])
    axis.plot(
        x, y, "--" if flat else "-", color=mark.colour, marker="none" if flat else mark.marker,
        markersize=6, markeredgecolor="white", markeredgewidth=0.6, label=mark.label, zorder=3,
    )  # fmt: skip
    if flat:
        axis.fill_between(x, y - sd, y + sd, color=mark.colour, alpha=0.13, linewidth=0)
    elif sd.any():
        axis.errorbar(x, y, yerr=sd, fmt="none", ecolor=mark.colour, elinewidth=1.2, capsize=2.5, zorder=2)


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
