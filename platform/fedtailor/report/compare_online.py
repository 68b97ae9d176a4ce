"""Where the compared runs are on W&B, and a W&B report of them. Nothing here can fail a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from fedtailor.report import wandb as wandb_sink
from fedtailor.report.compare import ComparedRun
from fedtailor.report.names import shortened
from fedtailor.report.wording import get_path

REPORTS = "wandb_workspaces"
"""Package that writes W&B reports."""

_LONGEST_TITLE = 128


def on_wandb(runs: Sequence[ComparedRun], text: str) -> tuple[str, ...]:
    """Sentences with addresses; empty, without any network call, unless all runs have ``wandb.mode=online``.

    Args:
        runs: the compared runs.
        text: Markdown for the report.
    """
    if any(get_path(run.info["config"], "wandb.mode") != "online" for run in runs):
        return ()
    try:
        places = [wandb_sink.place(run.folder) for run in runs]
        links = _links(places)
    except Exception as error:  # W&B lets errors of many libraries through, and none may fail a comparison
        return (f"No link to W&B: {type(error).__name__}: {error}",)
    if find_spec(REPORTS) is None:
        return (*links, f"A W&B report of these runs needs the package {REPORTS.replace('_', '-')}.")
    title = shortened(f"fedtailor: {', '.join(place.name for place in places)}", _LONGEST_TITLE)
    try:
        return (*links, f"Report: {wandb_sink.write_report(places, title, text, _keys(runs))}")
    except Exception as error:  # as above
        return (*links, f"No W&B report: {type(error).__name__}: {error}")


def _links(places: Sequence[wandb_sink.Place]) -> list[str]:
    """A sentence per project."""
    found = []
    for entity, project in dict.fromkeys((place.entity, place.project) for place in places):
        here = ", ".join(f"{p.name}: {p.id}" for p in places if (p.entity, p.project) == (entity, project))
        found.append(f"{wandb_sink.address(entity, project)} (runs {here})")
    return found


def _keys(runs: Sequence[ComparedRun]) -> list[str]:
    """Summary values that `wandb_sink.final_results` gives to all runs."""
    keys = [set(wandb_sink.final_results(run.values)[0]) for run in runs]
    return sorted(set.intersection(*keys))
