"""Where the compared runs are on W&B, and a W&B report of them. Nothing here can fail a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from urllib.parse import quote

from fedtailor.report.compare import ComparedRun
from fedtailor.report.names import shortened
from fedtailor.report.wandb import final_results, identity
from fedtailor.report.wording import get_path
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tracking.wandb_key import api_key, key_in_environment

REPORTS = "wandb_workspaces"
"""Package that writes W&B reports."""

_LONGEST_TITLE = 128


@dataclass(frozen=True)
class Place:
    """Where a run is on W&B: `identity` in a project of a user or team."""

    entity: str
    project: str
    id: str
    name: str


def place(run: RunFolder) -> Place:
    """Where `sync_run` puts a run; asks W&B for the key's entity where the configuration names none.

    Raises:
        ConfigError: neither an entity nor a key.
    """
    config = run.info()["config"]["wandb"]
    return Place(config["entity"] or _default_entity(), config["project"], identity(run), run.run_id)


def address(entity: str, project: str) -> str:
    """Page of a project, on the server that W&B is set up for."""
    import wandb

    return "/".join([wandb.setup().settings.app_url.rstrip("/"), quote(entity), quote(project)])


def make_report(places: Sequence[Place], title: str, text: str, keys: Sequence[str]) -> str:
    """Makes a W&B report of some runs, in the project of the first, and returns its address.

    Args:
        places: the runs.
        title: at most 128 characters.
        text: Markdown that stands at the top.
        keys: summary values to draw, a bar per run.

    Raises:
        ImportError: the package wandb-workspaces is not installed.
        ConfigError: no key.
    """
    wr: Any = import_module("wandb_workspaces.reports.v2")
    projects = dict.fromkeys((place.entity, place.project) for place in places)
    with key_in_environment():
        runsets = [
            wr.Runset(
                entity=entity,
                project=project,
                name=project,
                filters=f"Metric('ID') in {[p.id for p in places if (p.entity, p.project) == (entity, project)]}",
            )
            for entity, project in projects
        ]
        panels = [wr.RunComparer(diff_only="split"), *(wr.BarPlot(title=key, metrics=[key]) for key in keys)]
        report = wr.Report(
            entity=places[0].entity,
            project=places[0].project,
            title=title,
            blocks=[wr.MarkdownBlock(text=text), wr.PanelGrid(runsets=runsets, panels=panels)],
        )
        report.save()
        return str(report.url)


def _default_entity() -> str:
    import wandb

    return str(wandb.Api(api_key=api_key()).default_entity)


def on_wandb(runs: Sequence[ComparedRun], text: str) -> tuple[str, ...]:
    """Sentences with addresses; empty, without any network call, unless all runs have ``wandb.mode=online``.

    Args:
        runs: the compared runs.
        text: Markdown for the report.
    """
    if any(get_path(run.info["config"], "wandb.mode") != "online" for run in runs):
        return ()
    try:
        places = [place(run.folder) for run in runs]
        links = _links(places)
    except Exception as error:  # W&B lets errors of many libraries through, and none may fail a comparison
        return (f"No link to W&B: {type(error).__name__}: {error}",)
    if find_spec(REPORTS) is None:
        return (*links, f"A W&B report of these runs needs the package {REPORTS.replace('_', '-')}.")
    title = shortened(f"fedtailor: {', '.join(place.name for place in places)}", _LONGEST_TITLE)
    try:
        return (*links, f"Report: {make_report(places, title, text, _keys(runs))}")
    except Exception as error:  # as above
        return (*links, f"No W&B report: {type(error).__name__}: {error}")


def _links(places: Sequence[Place]) -> list[str]:
    """A sentence per project."""
    links = []
    for entity, project in dict.fromkeys((place.entity, place.project) for place in places):
        here = ", ".join(f"{p.name}: {p.id}" for p in places if (p.entity, p.project) == (entity, project))
        links.append(f"{address(entity, project)} (runs {here})")
    return links


def _keys(runs: Sequence[ComparedRun]) -> list[str]:
    """Summary values that `final_results` gives to all runs."""
    keys = [set(final_results(run.values)[0]) for run in runs]
    return sorted(set.intersection(*keys))
