"""Where the compared runs are on W&B, and a W&B report of them. Nothing here can fail a comparison."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from urllib.parse import quote

from fedtailor.report.compare import ComparedRun
from fedtailor.report.names import shortened
from fedtailor.report.wandb import final_results, identity
from fedtailor.tracking.wandb_key import KEY, api_key

REPORTS = "wandb_workspaces"
"""Package that writes W&B reports."""

_LONGEST_TITLE = 128


Places = dict[tuple[str, str], dict[str, str]]
"""Entity and project to the runs there: name to `identity`."""


def on_wandb(runs: Sequence[ComparedRun], text: str) -> tuple[str, ...]:
    """Sentences with addresses; empty, without any network call, unless all runs have ``wandb.mode=online``.

    Args:
        runs: the compared runs.
        text: Markdown for the report.
    """
    if any(run.exp.wandb.mode != "online" for run in runs):
        return ()
    try:
        found = places(runs)
        links = [
            f"{address(*project)} (runs {', '.join(f'{name}: {own[name]}' for name in own)})"
            for project, own in found.items()
        ]
    except Exception as error:  # W&B lets errors of many libraries through, and none may fail a comparison
        return (f"No link to W&B: {type(error).__name__}: {error}",)
    if find_spec(REPORTS) is None:
        return (*links, f"A W&B report of these runs needs the package {REPORTS.replace('_', '-')}.")
    title = shortened(f"fedtailor: {', '.join(run.run_id for run in runs)}", _LONGEST_TITLE)
    try:
        keys = set.intersection(*(set(final_results(run.values)[0]) for run in runs))
        return (*links, f"Report: {make_report(found, title, text, sorted(keys))}")
    except Exception as error:  # as above
        return (*links, f"No W&B report: {type(error).__name__}: {error}")


def places(runs: Sequence[ComparedRun]) -> Places:
    """Where `sync_run` puts runs; asks W&B for the key's entity where a configuration names none.

    Raises:
        ConfigError: neither an entity nor a key.
    """
    found: Places = {}
    for run in runs:
        config = run.exp.wandb
        found.setdefault((config.entity or _default_entity(), config.project), {})[run.run_id] = identity(run.folder)
    return found


def address(entity: str, project: str) -> str:
    """Page of a project, on the server that W&B is set up for."""
    import wandb

    return "/".join([wandb.setup().settings.app_url.rstrip("/"), quote(entity), quote(project)])


def make_report(runs: Places, title: str, text: str, keys: Sequence[str]) -> str:
    """Makes a W&B report of some runs, in the project of the first, and returns its address.

    Args:
        runs: where the runs are.
        title: at most 128 characters.
        text: Markdown that stands at the top.
        keys: summary values to draw, a bar per run.

    Raises:
        ImportError: the package wandb-workspaces is not installed.
        ConfigError: no key.
    """
    wr: Any = import_module(f"{REPORTS}.reports.v2")
    with _key_in_environment():
        runsets = [
            wr.Runset(entity=at[0], project=at[1], name=at[1], filters=f"Metric('ID') in {list(own.values())}")
            for at, own in runs.items()
        ]
        panels = [wr.RunComparer(diff_only="split"), *(wr.BarPlot(title=key, metrics=[key]) for key in keys)]
        blocks = [wr.MarkdownBlock(text=text), wr.PanelGrid(runsets=runsets, panels=panels)]
        entity, project = next(iter(runs))
        report = wr.Report(entity=entity, project=project, title=title, blocks=blocks)
        report.save()
        return str(report.url)


@contextmanager
def _key_in_environment() -> Iterator[None]:
    """The library of W&B reports takes no key as an argument."""
    before, os.environ[KEY] = os.environ.get(KEY), api_key()
    try:
        yield
    finally:
        if before is None:
            del os.environ[KEY]
        else:
            os.environ[KEY] = before


def _default_entity() -> str:
    import wandb

    return str(wandb.Api(api_key=api_key()).default_entity)
