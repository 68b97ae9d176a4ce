"""How a sweep looks in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import tune_spaces
from fedtailor.runs.console import plain_table
from tune_spaces.grid import combinations
from tune_spaces.plan import SweepPlan
from tune_spaces.record import Outcome, Trial

COLOURS = {"complete": "green", "stopped": "yellow", "failed": "red", "unfinished": "dim"}


def grids_table() -> Table:
    """Every published grid: what ``fedtailor sweep`` can be given."""
    table = plain_table("sweep", "method", "trials", "values", "decided by", numbers=("trials",))
    for address, grid in tune_spaces.grids().items():
        values = "\n".join(f"{key} = {', '.join(f'{v:g}' for v in found)}" for key, found in grid.space.items())
        count = str(len(combinations(grid.space)))
        table.add_row(address, grid.method, count, escape(values), escape(f"{grid.objective}\n{grid.says}"))
    return table


def show_plan(console: Console, plan: SweepPlan, where: str, workers: int, at_once: int) -> None:
    """What is about to run."""
    console.print(f"[bold]{escape(plan.sweep_id)}[/]  [dim]in {escape(where)}[/]", highlight=False)
    rows = {
        "grid": f"{plan.address}: {len(plan.trials)} trials of {plan.grid.method}",
        "judged by": f"{plan.objective} ({plan.judged.says}; {plan.grid.says})",
        "budgets, seeds": f"{', '.join(map(str, plan.config['budgets']))}; {', '.join(map(str, plan.config['seeds']))}",
        "at once": f"{at_once} trial(s) of {workers} worker(s)" + (", hopeless ones stopped by ASHA" * plan.asha),
        "first": f"{plan.base_run} trains what all trials share, so that none waits for another",
    }
    for name, value in rows.items():
        console.print(f"  [dim]{name:<14}[/] {escape(value)}", highlight=False, soft_wrap=True)


def trials_table(outcome: Outcome) -> Table:
    """All trials with the value that decides; the best in bold."""
    plan, best, paper = outcome.plan, outcome.best, outcome.plan.picked
    unit = " in %" if plan.judged.share else ""
    table = plain_table(
        "trial", *plan.grid.space, f"{plan.objective}{unit}", "state", "",
        title=f"{plan.sweep_id}: {plan.judged.says}{unit}", numbers=(*plan.grid.space, f"{plan.objective}{unit}"),
    )  # fmt: skip
    for trial in outcome.trials:
        equal = best is not None and trial is not best and trial.value == best.value
        notes = ["best"] * (trial is best) + ["equal"] * equal + ["the paper's choice"] * (dict(trial.values) == paper)
        shown = plan.judged.shown(trial.value) if trial.value is not None else ""
        style = "bold" if trial is best else None
        told = f"[{COLOURS[trial.state]}]{trial.state}[/]"
        numbers = (f"{value:g}" for value in trial.values.values())
        table.add_row(f"{trial.number:02d}", *numbers, shown, told, ", ".join(notes), style=style)
    if outcome.reference is not None:
        blank = ("" for _ in plan.grid.space)
        table.add_row("base", *blank, plan.judged.shown(outcome.reference), "", "not personalised")
    return table


def failures(outcome: Outcome) -> list[str]:
    """One line for each trial that failed."""
    return [_failure(trial) for trial in outcome.of_state("failed")]


def _failure(trial: Trial) -> str:
    values = ", ".join(f"{key}={value:g}" for key, value in trial.values.items())
    return f"{trial.run_id} ({values}): {trial.message}"
