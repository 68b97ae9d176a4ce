"""What can be named in a configuration, as tables."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import resources

from rich.markup import escape
from rich.table import Table

from fedtailor.runs.console import plain_table


def listing(what: str) -> Table:
    """The table of ``methods``, ``tasks``, ``models`` or ``presets``."""
    return _TABLES[what]()


def _methods() -> Table:
    from fedtailor.methods import METHODS

    table = plain_table("method", "what it is")
    for name, entry in METHODS.items():
        table.add_row(name, escape(entry.summary))
    return table


def _tasks() -> Table:
    from fedtailor.tasks.task import TASKS

    table = plain_table("task", "what it is")
    for name, load in TASKS.items():
        table.add_row(name, escape(_first_line(load)))
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
    from fedtailor.runs.experiment import preset_names

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
