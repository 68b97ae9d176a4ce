"""``fedtailor sweep``: a published grid as runs that share one base, with tables, a preset and a figure at the end."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actors.driver_actor import run_on_driver
from actors.placement import ActorPlan, plan_actors
from actors.session import cluster_nodes, ensure_ray
from fedtailor.cli.terminal import plain_table
from fedtailor.core.errors import ConfigError, Interrupted, SweepError, TailorError
from fedtailor.core.settings import EngineConfig
from fedtailor.experiment.launch import StopSignals, launch, load_experiment, run_serial
from fedtailor.experiment.prepare import prepare
from fedtailor.report.wandb import sync_wandb
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tracking.progress import Reporter, reporter
from tune_spaces import grids
from tune_spaces.figure import draw
from tune_spaces.grid import assignments, combinations
from tune_spaces.plan import SweepPlan, make_plan
from tune_spaces.results import (
    BEST,
    Outcome,
    base_is_there,
    begin_record,
    examine,
    refuse_other,
    settled,
    write_record,
)
from tune_spaces.search import search

_TUNES = signal.SIGUSR1
"""What Tune takes for the wish to end in order, however it is configured."""

COLOURS = {"complete": "green", "stopped": "yellow", "failed": "red", "unfinished": "dim"}


def grids_table() -> Table:
    """Every published grid: what ``fedtailor sweep`` can be given."""
    table = plain_table("sweep", "method", "trials", "values", "decided by", numbers=("trials",))
    for address, grid in grids().items():
        values = "\n".join(f"{key} = {', '.join(f'{v:g}' for v in found)}" for key, found in grid.space.items())
        count = str(len(combinations(grid.space)))
        table.add_row(address, grid.method, count, escape(values), escape(f"{grid.objective}\n{grid.source}"))
    return table


def show_plan(console: Console, plan: SweepPlan, where: str, workers: int, at_once: int) -> None:
    """What is about to run."""
    console.print(f"[bold]{escape(plan.sweep_id)}[/]  [dim]in {escape(where)}[/]", highlight=False)
    rows = {
        "grid": f"{plan.address}: {len(plan.trials)} trials of {plan.grid.method}",
        "judged by": f"{plan.objective} ({plan.judged.description}; {plan.grid.source})",
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
    score = f"{plan.objective}{unit}"
    table = plain_table(
        "trial", *plan.grid.space, score, "state", "",
        title=f"{plan.sweep_id}: {plan.judged.description}{unit}", numbers=(*plan.grid.space, score),
    )  # fmt: skip
    for trial in outcome.trials:
        equal = best is not None and trial is not best and trial.value == best.value
        notes = ["best"] * (trial is best) + ["equal"] * equal + ["the paper's choice"] * (dict(trial.values) == paper)
        shown = plan.judged.shown(trial.value) if trial.value is not None else ""
        style = "bold" if trial is best else None
        state = f"[{COLOURS[trial.state]}]{trial.state}[/]"
        numbers = (f"{value:g}" for value in trial.values.values())
        table.add_row(f"{trial.number:02d}", *numbers, shown, state, ", ".join(notes), style=style)
    if outcome.reference is not None:
        blank = ("" for _ in plan.grid.space)
        table.add_row("base", *blank, plan.judged.shown(outcome.reference), "", "not personalised")
    return table


def sweep(
    console: Console,
    address: str,
    words: Sequence[str],
    objective: str | None = None,
    sweep_id: str | None = None,
    asha: bool = False,
    trials_at_once: int | None = None,
    json_log: Console | None = None,
) -> Outcome:
    """Runs a grid, or what is missing of it, and shows the result.

    Args:
        console: terminal that shows tables and progress.
        address: ``<paper>/<grid>``.
        words: presets and overrides.
        objective: row of OBJECTIVES; default: the paper's.
        sweep_id: name; default: grid, presets and a hash, so that the same words find the same sweep again.
        asha: stop hopeless trials early.
        trials_at_once: most trials at a time; default: as many as fit.
        json_log: console that gets one JSON object per event, instead of showing them.

    Raises:
        SweepError: trials failed; the others are in the record.
        Interrupted: stopped by a signal; the same words go on.
        TailorError: what is wrong with the words, the place or the base.
    """
    plan = make_plan(address, words, objective, sweep_id, asha)
    storage = Storage(plan.config["storage"])
    folder = storage.local_path(plan.sweep_id)
    refuse_other(storage, plan)
    outcome = settled(storage, plan)
    if outcome is None:
        show = reporter(json_log or console, json_log is not None)
        try:
            outcome = _run(console, plan, storage, folder, trials_at_once, show)
        except TailorError as error:
            error.add_note("The same words take the sweep up again")
            raise
        finally:
            show.close()
    _conclude(console, storage, folder, outcome)
    return outcome


def _run(
    console: Console, plan: SweepPlan, storage: Storage, folder: Path, at_once: int | None, show: Reporter
) -> Outcome:
    exp = plan.base()
    session = ensure_ray(exp.engine.address, exp.engine.threads)
    try:
        actors, fit = _fit(exp.engine)
        parallel = min(at_once or fit, fit, len(plan.trials))
        show_plan(console, plan, storage.url, actors.count, parallel)
        _train_base(plan, storage, show)
        with TuneSignals(lambda text: show({"kind": "note", "text": text})) as signals:
            stopped, errors = search(plan, folder, actors, at_once, show)
        # Tune calls a trial that it has not started yet neither stopped nor failed.
        outcome = examine(storage, plan, stopped if signals.number is None else [], errors)
        write_record(storage, outcome)
        signals.check()
        return outcome
    finally:
        session.close()


def _fit(engine: EngineConfig) -> tuple[ActorPlan, int]:
    """Workers of a trial (one unless ``engine.actors`` says more), and how many trials fit at once.

    Raises:
        ConfigError: one actor per client, whose number a group cannot know.
        PlacementError: not even one trial fits.
    """
    if engine.mode != "pool":
        raise ConfigError(f"'engine.mode': a sweep needs 'pool', got '{engine.mode}'")
    count = 1 if engine.backend == "serial" else engine.actors or 1
    actors = plan_actors(engine, cluster_nodes(gpu_memory=engine.memory_gb is not None), count)
    return actors, max(1, actors.capacity // count)


def _train_base(plan: SweepPlan, storage: Storage, show: Reporter) -> None:
    """What all trials share, before the first: a trial that waited for another's base would hold its CPUs."""
    exp = plan.base()
    if base_is_there(storage, plan):
        show({"kind": "note", "text": f"{plan.base_run} is there already"})
        return
    backend = run_serial if exp.engine.backend == "serial" else run_on_driver
    with StopSignals(lambda text: show({"kind": "note", "text": text})) as stop:
        try:
            run = prepare(exp, plan.base_run, show)
            begin_record(storage, plan)
            stop.graceful = True
            launch(backend, run, exp, show, stop)
        except Interrupted as error:
            error.exit_code = stop.exit_code
            raise


class TuneSignals(StopSignals):
    """`StopSignals` around ``tuner.fit()``: the first signal asks Tune to end in order, a second ends at once.

    Tune's own handler knows SIGINT only and hides which signal came, so it is turned off.
    """

    def __enter__(self) -> TuneSignals:
        """Takes over the signals."""
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        super().__enter__()
        self._before[_TUNES] = signal.getsignal(_TUNES)
        return self

    def check(self) -> None:
        """Ends with the signal's exit code if one came.

        Raises:
            Interrupted: 130 for Ctrl-C, 143 for SIGTERM.
        """
        if self.number is not None:
            raise self._ended("stopped: what is committed is kept")

    def _received(self, number: int, _: FrameType | None) -> None:
        first, self.number = self.number is None, self.number or number
        if first and signal.getsignal(_TUNES) != self._before[_TUNES]:
            self.tell("stopping: the trials end at their last commit; once more (Ctrl-C) stops at once")
            signal.raise_signal(_TUNES)
            return
        raise self._ended("stopped at once: what is committed is kept")

    def _ended(self, text: str) -> Interrupted:
        error = Interrupted(text)
        error.exit_code = self.exit_code
        return error


def _conclude(console: Console, storage: Storage, folder: Path, outcome: Outcome) -> None:
    """Shows, draws and feeds; failures last, so that they decide the exit code.

    Raises:
        SweepError: trials failed.
    """
    plan, best = outcome.plan, outcome.best
    console.print(trials_table(outcome))
    if best is not None:
        figure, _ = draw(outcome, folder)
        preset = folder / BEST
        presets = [word for word in plan.words if "=" not in word]
        console.print(f"[green]best[/]  {assignments(best.values)}", highlight=False, soft_wrap=True)
        if outcome.flat:
            console.print("[yellow]all trials are equal: here the searched values change nothing[/]")
        console.print(f"figure: {figure}", highlight=False, soft_wrap=True)
        again = " ".join(["fedtailor run", *presets, str(preset)])
        console.print(f"preset: {preset}  use it: {again}", highlight=False, soft_wrap=True)
    _feed_wandb(console, storage, outcome)
    failed = outcome.of_state("failed")
    if failed:
        text = "; ".join(f"{trial.run_id} ({assignments(trial.values)}): {trial.message}" for trial in failed)
        raise SweepError(f"{len(failed)} of {len(outcome.trials)} trials failed: {text}. The same words try them again")


def _feed_wandb(console: Console, storage: Storage, outcome: Outcome) -> None:
    """One W&B run per finished trial, from its committed metrics, grouped by the sweep's name.

    Not Tune's own callback: that would log reports before they are committed, start a second run when a trial is
    restored, and carry the key into every trial's process.
    """
    for trial in outcome.of_state("complete"):
        run = RunFolder.open(storage, trial.run_id)
        if problem := sync_wandb(run, load_experiment(run)):
            again = f"repeat with: fedtailor sync {trial.run_id}"
            console.print(f"[yellow]W&B:[/] {trial.run_id}: {problem}; {again}", highlight=False)
