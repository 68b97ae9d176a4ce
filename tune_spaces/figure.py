"""The grid as a picture: a line for one searched key, a map for two, small multiples of maps for three."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fedtailor.report.names import method_name
from fedtailor.report.style import MUTED, SEQUENTIAL, Drawing, looks, plain, save, styled
from tune_spaces.grid import Value
from tune_spaces.results import Outcome, Trial

NAME = "grid"


def draw(outcome: Outcome, folder: Path) -> tuple[Path, Path]:
    """Writes ``grid.png`` and ``grid.svg``."""
    with styled():
        return save(grid_figure(outcome), folder)


def grid_figure(outcome: Outcome) -> Drawing:
    """The drawing; at least one trial must be complete."""
    plan = outcome.plan
    figure = _line(outcome) if len(plan.grid.space) == 1 else _maps(outcome)
    return Drawing(
        NAME,
        f"{plan.address}: {method_name(plan.grid.method)}",
        f"{plan.judged.description}, mean over languages, budgets and seeds",
        figure,
    )


def _label(outcome: Outcome) -> str:
    judged = outcome.plan.judged
    return f"{judged.description}, %" if judged.share else judged.description


def _shown(outcome: Outcome, value: float) -> float:
    return 100 * value if outcome.plan.judged.share else value


def _line(outcome: Outcome) -> Figure:
    plan = outcome.plan
    ((key, _),) = plan.grid.space.items()
    # A trial without a value breaks the line.
    points = sorted(
        (float(t.values[key]), float("nan") if t.value is None else _shown(outcome, t.value)) for t in outcome.trials
    )
    look = looks([plan.grid.method])[plan.grid.method]
    figure = Figure(figsize=(6.4, 3.4))
    axis = figure.subplots()
    axis.plot(*zip(*points, strict=True), color=look.colour, marker=look.marker, label=look.label)
    if outcome.reference is not None:
        axis.axhline(_shown(outcome, outcome.reference), color=MUTED, linestyle="--", linewidth=1.2, label="base model")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(list(map(float, plan.grid.space[key]))))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(plain))
    axis.margins(x=0.08, y=0.2)
    _mark(axis, outcome, key)
    for trial in outcome.trials:
        if trial.value is None:
            axis.annotate(
                trial.state, (float(trial.values[key]), 0), xycoords=("data", "axes fraction"), xytext=(0, 4),
                textcoords="offset points", ha="center", fontsize=8, color=MUTED,
            )  # fmt: skip
    axis.set(xlabel=key, ylabel=_label(outcome), title=f"{look.label}: {plan.address}")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1)
    return figure


def _mark(axis: Axes, outcome: Outcome, key: str) -> None:
    """Says at the points which is the best and which the paper chose."""
    for trial in outcome.trials:
        if trial.value is not None:
            axis.annotate(
                _cell(outcome, trial), (float(trial.values[key]), _shown(outcome, trial.value)), xytext=(0, 7),
                textcoords="offset points", ha="center", va="bottom", fontsize=8,
                fontweight="bold" if trial is outcome.best else "normal",
            )  # fmt: skip


def _maps(outcome: Outcome) -> Figure:
    """A map for every combination of the keys but two: those with most values are a map's rows and columns."""
    space = outcome.plan.grid.space
    column, row, *rest = sorted(space, key=lambda key: -len(space[key]))
    panels = list(itertools.product(*(space[key] for key in rest)))
    width = 1.5 + 0.95 * len(space[column])
    figure = Figure(figsize=(max(3.6, width) * len(panels) + 0.9, 1.7 + 0.62 * len(space[row])))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    table = pd.DataFrame([{**t.values, "value": t.value, "text": _cell(outcome, t)} for t in outcome.trials])
    table["value"] = table["value"].astype(float) * (100 if outcome.plan.judged.share else 1)
    low, high = table["value"].min(), table["value"].max()
    norm = Normalize(low, max(high, low + 1e-9))
    cmap = SEQUENTIAL if outcome.plan.judged.mode == "max" else f"{SEQUENTIAL}_r"
    for axis, fixed in zip(axes, panels, strict=True):
        here = table[(table[rest] == list(fixed)).all(axis=1)]
        values, texts = (here.pivot(index=row, columns=column, values=what) for what in ("value", "text"))
        _panel(axis, values, texts, norm, cmap)
        axis.set_title(", ".join(f"{key} = {value:g}" for key, value in zip(rest, fixed, strict=True)))
    axes[0].set_ylabel(row)
    bar = figure.colorbar(ScalarMappable(norm, cmap), ax=list(axes), shrink=0.9, aspect=18, pad=0.02)
    bar.set_label(_label(outcome))
    bar.outline.set_visible(False)
    figure.suptitle(
        f"{method_name(outcome.plan.grid.method)}: {outcome.plan.address}", x=0.01, ha="left", fontsize=10,
        fontweight="bold",
    )  # fmt: skip
    return figure


def _panel(axis: Axes, values: pd.DataFrame, texts: pd.DataFrame, norm: Normalize, cmap: str) -> None:
    """A cell per trial; those without a value are hatched."""
    sns.heatmap(
        values, annot=texts, fmt="", norm=norm, cmap=cmap, cbar=False, linewidths=0.8, ax=axis,
        annot_kws={"fontsize": 8, "linespacing": 1.3}, xticklabels=[plain(float(value)) for value in values.columns],
        yticklabels=[plain(float(value)) for value in values.index],
    )  # fmt: skip
    for y, x in np.argwhere(values.isna().to_numpy()):
        axis.text(x + 0.5, y + 0.5, str(texts.iat[y, x]), ha="center", va="center", fontsize=8, linespacing=1.3)
    for text in axis.texts:
        text.set_fontweight("bold" if "best" in text.get_text() else "normal")
    axis.patch.set(facecolor="#f2f3f5", edgecolor="white", hatch="///")
    axis.invert_yaxis()
    axis.set_ylabel("")
    axis.grid(False)
    axis.tick_params(length=0, rotation=0)


def _cell(outcome: Outcome, trial: Trial) -> str:
    shown = trial.state if trial.value is None else outcome.plan.judged.shown(trial.value)
    paper: Mapping[str, Value] = outcome.plan.picked
    marks = ["best"] * (trial is outcome.best) + ["paper"] * (dict(trial.values) == paper)
    return "\n".join(filter(None, [shown, ", ".join(marks)]))
