"""The training loss of all methods over local steps in one figure, of answers its perplexity, and the test loss.

As Figure 4 of PF2LoRA (Hao et al. 2025, arXiv 2503.03920), "averaged across all the clients", and Figures 2 and 5 of
pFedGPT (Shen et al., EMNLP 2025), whose loss is that of test rows: ``strategy.evaluate_every`` scores them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fedtailor.experiment.config import ExperimentBase
from fedtailor.report import names, style
from fedtailor.report.style import DASHES, MUTED, Drawing, Look, Missing, drawable, looks
from fedtailor.tasks.task import TASKS

TITLE = "Training loss of all methods"
_TRAINED, _TESTED = "train_loss", "test_loss"


def loss_curves(runs: Mapping[str, tuple[pd.DataFrame, ExperimentBase]]) -> Drawing | Missing:
    """A line per method and run: colour shows the method, dashes the run.

    Args:
        runs: name of a run to what `curves.round_means` made of its rows, and its configuration.

    Returns:
        A panel of the loss, of a task of answers one of exp(loss), the perplexity of a token, and one of the test loss
        where it was scored over the rounds. The x axis counts local steps where every method takes a fixed number of
        them in a round, else rounds.
    """
    found = {name: means for name, (series, _) in runs.items() if len(means := _means(series, _TRAINED))}
    lines = [(name, str(method), rows) for name, means in found.items() for method, rows in means.groupby("method")]
    if len(lines) < 2:
        return Missing(TITLE, "needs two methods that train in rounds")
    steps = {(name, method): _steps(runs[name][1], method) for name, method, _ in lines}
    counted = all(steps.values())
    look = looks(method for _, method, _ in lines)
    answers = all(TASKS[runs[name][1].task.name].kind == "generation" for name in found)
    tested = {name: _means(runs[name][0], _TESTED) for name in found}
    scored = [(name, str(method), rows) for name in found for method, rows in tested[name].groupby("method")]
    panels = [("Training loss", lines)]
    if answers:
        panels += [("Perplexity", [(name, m, rows.assign(value=np.exp(rows["value"]))) for name, m, rows in lines])]
    if scored:
        panels += [("Test loss", scored)]
    figure, axes = style.panels(len(panels), len(panels), 5.2 * len(panels), 3.2)
    for axis, (title, series) in zip(axes, panels, strict=True):
        for name, method, rows in series:
            each = steps[name, method] if counted else 1
            x = (rows["round"].to_numpy() + 1) * (each or 1)
            dashes = DASHES[list(found).index(name) % len(DASHES)]
            marker = look[method].marker if len(x) < 8 else "none"
            axis.plot(
                x, rows["value"], marker, color=look[method].colour, linestyle=dashes, linewidth=1.5, markersize=4
            )
        axis.set_title(title)
        axis.set_xlabel("local steps of a client" if counted else "round")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _legends(axes[0], look, list(found))
    return Drawing("training_loss", TITLE, _caption(list(found), answers, bool(scored)), figure)


def _means(series: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean of a round: method, round, value; over clients, then seeds; at a method's largest budget."""
    series = series[(series["stage"] == "strategy") & (series["metric"] == metric)]
    largest = series.groupby("method")["budget"].transform("max")
    own = series[series["budget"] == largest]
    return own.groupby(["method", "round"])[["value"]].mean().reset_index()


def _steps(exp: ExperimentBase, method: str) -> int | None:
    """Local steps that a client takes in a round, where the method's section names them."""
    return getattr(getattr(exp, method, None), "local_steps", None)


def _legends(axis: Axes, look: Mapping[str, Look], runs: list[str]) -> None:
    figure = axis.figure
    methods = [Line2D([], [], color=own.colour, linewidth=3, label=own.label) for own in look.values()]
    figure.legend(handles=methods, loc="outside upper left", ncols=min(len(methods), 6), handlelength=1.3)
    if len(runs) > 1:
        labels = [names.shortened(drawable(run), 44) for run in runs]
        lines = [
            Line2D([], [], color=MUTED, linestyle=DASHES[k % len(DASHES)], label=label)
            for k, label in enumerate(labels)
        ]
        figure.legend(handles=lines, loc="outside lower left", ncols=min(len(lines), 3), handlelength=3.2)


def _caption(runs: list[str], answers: bool, scored: bool) -> str:
    parts = ["Mean over the clients of a round, weighted by their examples, as each method reports it while it trains"]
    parts += ["; perplexity is exp of that mean"] if answers else []
    parts += [". Test loss: of every client's model as it would be if the rounds ended there"] if scored else []
    parts += [". Colour: method; dashes: run"] if len(runs) > 1 else []
    return "".join(parts) + "."
