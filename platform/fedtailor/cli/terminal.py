"""How results, errors and headers look in a terminal; what can be named in a configuration, as tables.

Heavy imports are inside the functions, so that help and errors come at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedtailor.core.errors import ConfigError, TailorError

if TYPE_CHECKING:
    import pandas as pd

    from fedtailor.experiment.config import ExperimentBase


def console(stderr: bool = False) -> Console:
    """A console that does not squeeze tables to 80 columns where nobody set a width (files, pipes, CI)."""
    found = Console(stderr=stderr, highlight=False)
    wide = found.is_terminal or "COLUMNS" in os.environ
    return found if wide else Console(stderr=stderr, highlight=False, width=120)


def show_error(console: Console, error: TailorError) -> None:
    """A message without traceback, one bullet per problem."""
    from fedtailor.storage.provenance import scrub

    if isinstance(error, ConfigError):
        count = "1 problem" if len(error.problems) == 1 else f"{len(error.problems)} problems"
        console.print(f"[bold red]The configuration cannot run:[/] {count}")
    else:
        console.print(f"[bold red]{type(error).__name__.removesuffix('Error') or 'Error'}[/]")
    for problem in error.problems if isinstance(error, ConfigError) else [str(error)]:
        console.print(f"  [red]•[/] {escape(scrub(problem))}", soft_wrap=not console.is_terminal)
    for note in getattr(error, "__notes__", []):
        console.print(f"  [dim]{escape(note)}[/]", soft_wrap=not console.is_terminal)


def plain_table(*columns: str, title: str = "", numbers: Sequence[str] = ()) -> Table:
    """A table without outer lines; columns named in ``numbers`` are aligned right."""
    table = Table(
        box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False,
        collapse_padding=True,
    )  # fmt: skip
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold", no_wrap=number == 0)
    return table


def show_header(console: Console, run_id: str, exp: ExperimentBase) -> None:
    """What is about to run, in some lines."""
    from fedtailor.models.source import model_title

    console.print(f"[bold]{escape(run_id)}[/]  [dim]in {escape(exp.storage)}[/]")
    rows = {
        "task, model": f"{exp.task.title}, {model_title(exp.model)}; base dropout {exp.model.base_dropout:g}",
        "methods": ", ".join(exp.methods),
        "budgets, seeds": f"{', '.join(map(str, exp.budgets))}; {', '.join(map(str, exp.seeds))}",
        **({} if exp.attack.name == "none" else {"attack": str(exp.attack)}),
        "engine": f"{exp.engine.backend}, {exp.engine.threads} thread(s) per worker, {exp.engine.dtype}"
        + (f", {exp.model.attention} attention" if exp.model.attention else ""),
    }
    for name, value in rows.items():
        console.print(f"  [dim]{name:<14}[/] {escape(value)}")
    show_privacy(console, exp, 14)


def show_privacy(console: Console, exp: ExperimentBase, width: int, seen: int | None = None) -> None:
    """Epsilon and what it does not cover; nothing without a privacy section.

    Args:
        console: where to show.
        exp: whole configuration.
        width: width of the column of names.
        seen: clients that cohorts are drawn from, where the data are known.
    """
    from fedtailor.experiment.config import seen_clients
    from fedtailor.experiment.privacy import privacy_lines

    if seen is None and exp.task_entry.clients != "dealt":
        return  # how many clients there are is not known before the data is
    for number, line in enumerate(privacy_lines(exp, seen or seen_clients(exp))):
        name = "privacy" if not number else ""
        console.print(f"  [dim]{name:<{width}}[/] {escape(line)}")


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
        here = {block.budget: block.average for block in found if block.pool == pool}
        methods = list(dict.fromkeys(name for block in found if block.pool == pool for name in block.methods))
        for method in methods:
            scores = [here.get(budget, {}).get(method) for budget in budgets]
            texts = ["" if score is None else f"{100 * score.mean:.2f}" for score in scores]
            cells = [f"[bold]{text}[/]" if s and s.best else text for s, text in zip(scores, texts, strict=True)]
            label = pool_name(pool).split()[0].lower() if method == methods[0] else ""
            table.add_row(label, method_name(method), *cells, end_section=method == methods[-1])
    return table


def listing(what: str) -> Table:
    """The table of ``methods``, ``tasks``, ``models`` or ``presets``."""
    rows = {"methods": _methods, "tasks": _tasks, "models": _models, "presets": _presets}[what]()
    table = plain_table(what.removesuffix("s"), "what it is")
    for name, summary in rows.items():
        # What stands for a name is in capitals.
        table.add_row(f"[dim]{name}[/]" if name.isupper() else name, escape(summary))
    return table


def _methods() -> Mapping[str, str]:
    from fedtailor.methods import METHODS
    from fedtailor.methods.external import add_method, installed

    for name, reference in installed().items():
        if name not in METHODS:
            add_method(reference, f"entry point {name}")
    summaries = {name: entry.summary for name, entry in METHODS.items()}
    return {**summaries, "PACKAGE.MODULE:ENTRY": "a method of your own: methods=[base,mypkg.mymethod:ENTRY]"}


def _tasks() -> Mapping[str, str]:
    from fedtailor.tasks.task import TASKS

    docs = {name: sys.modules[entry.load.__module__].__doc__ or "" for name, entry in TASKS.items()}
    return {name: doc.split("\n")[0].partition(": ")[2] for name, doc in docs.items()}


def _models() -> Mapping[str, str]:
    from fedtailor.models.source import EMBEDDED, EMBEDDED_CAUSAL, PRESETS, PRETRAINED

    return {
        EMBEDDED: "embedded: built from the task's own texts, random weights, no download",
        EMBEDDED_CAUSAL: "embedded, for generation: a small LLaMA, made in the same way",
        PRETRAINED: "made once with: fedtailor pretrain --task masakhanews --task xnli",
        **{name: f"{hub_id}; model.path=FOLDER takes a local copy" for name, hub_id in PRESETS.items()},
        "OWNER/NAME": "any sequence classifier or causal language model of the Hugging Face hub",
        "FOLDER": "a local Hugging Face folder",
    }


def _presets() -> Mapping[str, str]:
    """Each preset's first line, up to the end of its sentence."""
    from importlib.resources import files

    from fedtailor.experiment.compose import preset_names

    summaries = {}
    for name in preset_names():
        lines = (files("fedtailor.presets") / f"{name}.yaml").read_text("utf-8").splitlines()
        first, *rest = [line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines)] or [""]
        if rest and not first.endswith((".", ":")):
            first += f" {' '.join(rest).partition('. ')[0].rstrip('.')}."
        summaries[name] = first.rstrip(":")
    return summaries
