"""Weights & Biases, fed from committed metrics alone: one W&B run per experiment, rebuilt when asked for.

A failure here costs nothing: the run folder is complete without it, and ``fedtailor sync`` does it again.
"""

from __future__ import annotations

import netrc
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args
from urllib.parse import quote, urlparse

import numpy as np

from fedtailor.core.errors import ConfigError, StorageError
from fedtailor.runs.run_folder import RunFolder
from fedtailor.runs.stages import short_hash

if TYPE_CHECKING:
    import pandas as pd

Mode = Literal["offline", "online"]
KEY, KEY_FILE = "WANDB_API_KEY", "WANDB_API_KEY_FILE"


def sync(run: RunFolder, mode: str, project: str = "fedtailor", entity: str | None = None) -> str:
    """Rebuilds the W&B run of an experiment from its committed Parquet files.

    Args:
        run: its folder; must be local.
        mode: ``offline`` writes ``<run>/wandb/offline-run-*`` in place of the one before; ``online`` adds
            what the server's run does not have yet.
        project: W&B project.
        entity: W&B user or team; None: the key's default.

    Returns:
        The folder, or the address of the run.

    Raises:
        ConfigError: another mode, or no key for ``online``.
        StorageError: nothing is committed yet.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"'wandb.mode': {mode} cannot be synced; use --mode offline or --mode online")
    metrics = run.metrics()
    if metrics.empty:
        raise StorageError(f"run '{run.run_id}' has no committed metrics yet")
    place = run.storage.local_path(run.run_id)
    key = _api_key() if mode == "online" else None
    work = place / f".wandb-{secrets.token_hex(4)}"
    work.mkdir()
    try:
        address = _write(run, metrics, cast(Mode, mode), project, entity, work, key)
        if mode == "online":
            return address
        return str(_replace(place / "wandb", work))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def identity(run: RunFolder) -> str:
    """Id of the W&B run: the same for every sync of an experiment."""
    info = run.info()
    return short_hash([run.run_id, info["created"], info["config"]])


@dataclass(frozen=True)
class Place:
    """Where a run is on W&B: `identity` in a project of a user or team."""

    entity: str
    project: str
    id: str
    name: str


def place(run: RunFolder) -> Place:
    """Where `sync` puts a run; asks W&B for the key's entity where the configuration names none.

    Raises:
        ConfigError: neither an entity nor a key.
    """
    config = run.info()["config"]["wandb"]
    return Place(config["entity"] or _default_entity(), config["project"], identity(run), run.run_id)


def address(entity: str, project: str) -> str:
    """Page of a project, on the server that W&B is set up for."""
    import wandb

    return "/".join([wandb.setup().settings.app_url.rstrip("/"), quote(entity), quote(project)])


def write_report(places: Sequence[Place], title: str, text: str, keys: Sequence[str]) -> str:
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
    with _key_in_environment():
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

    return str(wandb.Api(api_key=_api_key()).default_entity)


@contextmanager
def _key_in_environment() -> Iterator[None]:
    """For a library that takes no key as an argument."""
    before, os.environ[KEY] = os.environ.get(KEY), _api_key()
    try:
        yield
    finally:
        if before is None:
            del os.environ[KEY]
        else:
            os.environ[KEY] = before


def series(metrics: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Points of all curves in the order of their commits: means over clients, weighted by examples.

    Yields:
        ``{"round": 3, "strategy/fedp2eft/seed42/psg_loss": 0.12, ...}``, one per stage, seed and round.
    """
    rows = metrics[(metrics["stage"] != "personalise") & (metrics["weight"] > 0)]
    points: Any = rows.groupby(["stage", "method", "seed", "round"], sort=False)
    for (stage, method, seed, number), point in points:
        name = f"{stage}/seed{seed}" if stage == "base" else f"{stage}/{method}/seed{seed}"
        values = {
            f"{name}/{metric}": float(np.average(part["value"], weights=part["weight"]))
            for metric, part in point.sort_values(["metric", "client"]).groupby("metric")
        }
        yield {"round": int(number), **values}


def final_results(metrics: pd.DataFrame) -> tuple[dict[str, float], pd.DataFrame]:
    """Summary values ``final/<pool>/<method>/r<budget>/<metric>`` and the table per language behind them."""
    from fedtailor.runs.report.results import AVERAGE, checked, results_table, scores

    scored = scores(checked(metrics))
    if scored.empty:
        return {}, scored
    table = results_table(scored)
    summary = {}
    for row in table[table["language"] == AVERAGE].to_dict("records"):
        budget = f"/r{row['budget']}" if row["budget"] >= 0 else ""
        summary[f"final/{row['pool']}/{row['method']}{budget}/{row['metric']}"] = float(row["mean"])
    return summary, table


def _write(
    run: RunFolder,
    metrics: pd.DataFrame,
    mode: Mode,
    project: str,
    entity: str | None,
    work: Path,
    key: str | None,
) -> str:
    import wandb

    config = run.info()["config"]
    quiet = {"console": "off", "silent": True, "disable_git": True, "save_code": False}
    private = {"x_disable_stats": True, "x_disable_meta": True, "x_disable_machine_info": True}
    # Steps are numbered here and grow: a resumed run ignores those it has, so nothing is logged twice.
    session = wandb.init(
        mode=mode, project=project, entity=entity, dir=str(work), id=identity(run), name=run.run_id,
        group=f"{config['task']['name']} x {config['model']['name']}", config=config, resume="allow",
        reinit="create_new", settings=wandb.Settings(**quiet, **private, **({"api_key": key} if key else {})),
    )  # fmt: skip
    try:
        session.define_metric("round")
        session.define_metric("*", step_metric="round")
        step = 0
        for step, point in enumerate(series(metrics), 1):
            session.log(point, step=step)
        summary, table = final_results(metrics)
        if len(table):
            plain = table.astype(object).where(table.notna(), None)
            results = wandb.Table(columns=list(plain.columns), data=plain.to_numpy())
            session.log({"results": results}, step=step + 1)
        session.summary.update(summary)
    except BaseException:
        session.finish(exit_code=1)
        raise
    address = str(session.url) if mode == "online" else ""
    session.finish()
    return address


def _replace(place: Path, work: Path) -> Path:
    """Puts the one offline run of ``work`` in the place of whatever was there."""
    made = list((work / "wandb").glob("offline-run-*"))
    if len(made) != 1:
        raise StorageError(f"W&B wrote {len(made)} offline runs instead of one")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    made[0].rename(place / made[0].name)
    return place / made[0].name


def _api_key() -> str:
    """The key from the environment, the file that it names, or ~/.netrc; never from a configuration.

    Raises:
        ConfigError: there is none, or the file cannot be read.
    """
    if found := os.environ.get(KEY):
        return found
    if path := os.environ.get(KEY_FILE):
        try:
            return Path(path).read_text().strip()
        except OSError as error:
            raise ConfigError(f"{KEY_FILE}: {path} cannot be read: {error.strerror}") from error
    import wandb

    # The server that this version of wandb (or WANDB_BASE_URL) talks to, and the one that older keys are filed under.
    hosts = [urlparse(url).hostname or "" for url in (wandb.Settings().base_url, "https://api.wandb.ai")]
    with suppress(OSError, netrc.NetrcParseError):
        known = netrc.netrc()
        for host in hosts:
            if entry := known.authenticators(host):
                return str(entry[2])
    raise ConfigError(f"wandb.mode=online needs a key: set {KEY} or {KEY_FILE}, or use wandb.mode=offline")
