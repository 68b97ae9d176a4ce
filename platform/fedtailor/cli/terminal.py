"""How results, errors and run states look in a terminal; what can be named in a configuration, as tables."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from importlib import resources
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from fedtailor.core.errors import ConfigError, TailorError
from fedtailor.storage.provenance import scrub

if TYPE_CHECKING:
    import pandas as pd

    from fedtailor.experiment.config import ExperimentBase
    from fedtailor.report.scores import Cell


STATES = {
    "complete": "green", "running": "cyan", "interrupted": "yellow", "failed": "red", "dead": "bold red",
    "created": "dim",
}  # fmt: skip

LINE_EVERY_S = 30.0
"""Between two lines of a pretraining where there is no terminal."""


def show_error(console: Console, error: TailorError) -> None:
    """A message without traceback, one bullet per problem."""
    kind = type(error).__name__.removesuffix("Error") or "Error"
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    if isinstance(error, ConfigError):
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        console.print(f"[bold red]The configuration cannot run:[/] {count}", highlight=False)
    else:
        console.print(f"[bold red]{kind}[/]", highlight=False)
    for problem in map(scrub, problems):
        console.print(f"  [red]•[/] {escape(problem)}", highlight=False, soft_wrap=not console.is_terminal)
    for note in getattr(error, "__notes__", []):
        console.print(f"  [dim]{escape(note)}[/]", highlight=False, soft_wrap=not console.is_terminal)


def plain_table(*columns: str, title: str = "", numbers: Sequence[str] = ()) -> Table:
    """A table without outer lines; columns named in ``numbers`` are aligned right."""
    table = Table(
        box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False,
        collapse_padding=True,
    )  # fmt: skip
    for number, name in enumerate(columns):
        justify: JustifyMethod = "right" if name in numbers else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=number == 0)
    return table


def show_header(console: Console, run_id: str, exp: ExperimentBase) -> None:
    """What is about to run, in some lines."""
    listed = ", ".join
    console.print(f"[bold]{escape(run_id)}[/]  [dim]in {escape(exp.storage)}[/]", highlight=False)
    rows = {
        "task, model": f"{exp.task.name}, {exp.model.name} (base dropout {exp.model.base_dropout:g})",
        "methods": listed(exp.methods),
        "budgets, seeds": f"{listed(map(str, exp.budgets))}; {listed(map(str, exp.seeds))}",
        **({} if exp.attack.name == "none" else {"attack": str(exp.attack)}),
        "engine": f"{exp.engine.backend}, {exp.engine.threads} thread(s) per worker, {exp.engine.dtype}",
    }
    for name, value in rows.items():
        console.print(f"  [dim]{name:<14}[/] {escape(value)}", highlight=False)
    show_privacy(console, exp, 14)


def show_privacy(console: Console, exp: ExperimentBase, width: int, seen: int | None = None) -> None:
    """Epsilon and what it does not cover; nothing without a privacy section.

    Args:
        console: where to.
        exp: whole configuration.
        width: of the column of names.
        seen: clients that cohorts are drawn from, where the data are known.
    """
    from fedtailor.experiment.privacy import privacy_lines, seen_clients

    if seen is None and exp.task_entry.clients == "natural":
        return  # how many clients there are is not known before the data is
    for number, line in enumerate(privacy_lines(exp, seen or seen_clients(exp))):
        name = "privacy" if not number else ""
        console.print(f"  [dim]{name:<{width}}[/] {escape(line)}", highlight=False)


def summary_table(metrics: pd.DataFrame) -> Table | None:
    """Methods by budgets, the run's measure in % as the mean over languages, for each pool; None without results."""
    from fedtailor.report.names import method_name, pool_name
    from fedtailor.report.scores import blocks, checked, scored_rows

    found = blocks(scored_rows(checked(metrics)))
    if not found:
        return None
    budgets = list(dict.fromkeys(block.budget for block in found))
    names = ["" if budget is None else f"r = {budget}" for budget in budgets]
    measure = found[0].measure
    title = f"{measure.title} in %, {measure.mean}" + (" and seeds" if len(found[0].seeds) > 1 else "")
    table = plain_table("clients", "method", *names, title=title, numbers=names)
    for pool in dict.fromkeys(block.pool for block in found):
        here = {block.budget: block for block in found if block.pool == pool}
        methods = list(dict.fromkeys(name for block in here.values() for name in block.methods))
        for method in methods:
            cells = [here[budget].average.get(method) if budget in here else None for budget in budgets]
            label = pool_name(pool).split()[0].lower() if method == methods[0] else ""
            shown = ("" if cell is None else _percent(cell) for cell in cells)
            table.add_row(label, method_name(method), *shown, end_section=method == methods[-1])
    return table


def _percent(cell: Cell) -> str:
    return f"[bold]{100 * cell.mean:.2f}[/]" if cell.best else f"{100 * cell.mean:.2f}"


def status_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """One row per stage: key, what is committed, artifact."""
    table = plain_table("stage", "committed", "artifact", numbers=("committed",))
    for stage in stages:
        mark = "[green]done[/]" if stage["done"] else ""
        total = f"/{stage['total']}" if stage["total"] else ""
        table.add_row(escape(stage["key"]), f"{mark} {stage['committed']}{total}".strip(), stage["artifact"])
    return table


def terminal(stderr: bool = False) -> Console:
    """A console that does not squeeze tables to 80 columns where nobody set a width (files, pipes, CI)."""
    console = Console(stderr=stderr)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(stderr=stderr, width=120)


class PretrainView:
    """Receives the events of `models.pretrain`; ``with PretrainView(console) as show: ...``.

    A bar on a terminal, a line now and then elsewhere.

    Args:
        console: where to show.
        clock: seconds, for the speeds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}")
        self._bar = Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=1, speed="", visible=False)
        self._loss: float | None = None
        self._start: Mapping[str, Any] = {}
        self._began = self._said = 0.0

    def __enter__(self) -> PretrainView:
        """Takes the terminal's last line."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the terminal as it was."""
        self._bar.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Shows one event."""
        if event["kind"] == "note":
            self._console.print(escape(event["text"]), highlight=False)
        elif event["kind"] == "start":
            self._start, self._began = event, self._clock()
            self._said = self._began
            self._bar.update(self._task, total=event["steps"], completed=event["step"], visible=True)
        elif event["kind"] == "step":
            self._step(event["step"], event["loss"])
        elif event["kind"] == "measure":
            self._console.print(
                f"step {event['step']}: train loss {event['train_loss']:.3f}, held-out loss "
                f"{event['held_out_loss']:.3f}, accuracy {event['held_out_accuracy']:.1%} of masked tokens",
                highlight=False,
            )

    def _step(self, step: int, loss: float) -> None:
        self._loss = loss if self._loss is None else 0.98 * self._loss + 0.02 * loss
        now, steps = self._clock(), self._start["steps"]
        rate = (step - self._start["step"]) / max(now - self._began, 1e-9)
        left, tokens = timedelta(seconds=round((steps - step) / rate)), rate * self._start["tokens"]
        speed = f"loss {self._loss:.3f}  {rate:.2f} steps/s  {tokens:,.0f} tokens/s  ETA {left}"
        self._bar.update(self._task, completed=step, speed=speed)
        self._bar.refresh()
        if not self._console.is_terminal and now - self._said >= LINE_EVERY_S:
            self._said = now
            self._console.print(f"step {step}/{steps}  {speed}", highlight=False)


def listing(what: str) -> Table:
    """The table of ``methods``, ``tasks``, ``models`` or ``presets``."""
    return _TABLES[what]()


def _methods() -> Table:
    from fedtailor.methods import METHODS
    from fedtailor.methods.external import add_method, installed

    table = plain_table("method", "what it is")
    for name, reference in installed().items():
        if name not in METHODS:
            add_method(reference, f"entry point {name}")
    for name, entry in METHODS.items():
        table.add_row(name, escape(entry.summary))
    table.add_row("[dim]PACKAGE.MODULE:ENTRY[/]", "a method of your own: methods=[base,mypkg.mymethod:ENTRY]")
    return table


def _tasks() -> Table:
    from fedtailor.tasks.task import TASKS

    table = plain_table("task", "what it is")
    for name, entry in TASKS.items():
        table.add_row(name, escape(_first_line(entry.load)))
    return table


def _models() -> Table:
    from fedtailor.models.source import EMBEDDED, EMBEDDED_CAUSAL, PRESETS, PRETRAINED

    table = plain_table("model", "what it is")
    table.add_row(EMBEDDED, "embedded: built from the task's own texts, random weights, no download")
    table.add_row(EMBEDDED_CAUSAL, "embedded, for generation: a small LLaMA, made in the same way")
    table.add_row(PRETRAINED, "made once with: fedtailor pretrain --task masakhanews --task xnli")
    for name, hub_id in PRESETS.items():
        table.add_row(name, f"{hub_id}; model.path=FOLDER takes a local copy")
    table.add_row("[dim]OWNER/NAME[/]", "any sequence classifier or causal language model of the Hugging Face hub")
    table.add_row("[dim]FOLDER[/]", "a local Hugging Face folder")
    return table


def _presets() -> Table:
    from fedtailor.experiment.compose import preset_names

    table = plain_table("preset", "what it is")
    for name in preset_names():
        table.add_row(name, escape(_preset_summary(name)))
    return table


def _preset_summary(name: str) -> str:
    text = (resources.files("fedtailor.presets") / f"{name}.yaml").read_text("utf-8")
    return text.split("\n")[0].lstrip("# ") if text.startswith("#") else ""


def _first_line(load: Callable[..., object]) -> str:
    text = sys.modules[load.__module__].__doc__ or ""
    return text.split("\n")[0].partition(": ")[2]


_TABLES: dict[str, Callable[[], Table]] = {
    "methods": _methods,
    "tasks": _tasks,
    "models": _models,
    "presets": _presets,
}
