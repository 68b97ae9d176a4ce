"""Weights & Biases, fed from committed metrics alone: one W&B run per experiment, rebuilt when asked for.

Curves, final results and their table are computed anew each time. A failure costs nothing: the run folder is complete
without W&B, and ``fedtailor sync`` does it again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtailor.core.errors import StorageError, TailorError
from fedtailor.core.settings import WandbConfig
from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.stages import short_hash
from fedtailor.report.wandb_session import Identity, add_extras, session
from fedtailor.storage.digest import DONE
from fedtailor.storage.lock import Lock
from fedtailor.storage.provenance import scrub
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tracking.wandb_key import Mode, api_key, settled_mode

if TYPE_CHECKING:
    import pandas as pd

_WORK = ".wandb-"


def settled(run: RunFolder, metrics: pd.DataFrame) -> pd.DataFrame:
    """Rows of rounds to which no later sync can add an earlier one: up to the first stage that is not finished.

    Stages may finish out of order (another run may have made one of them), and W&B takes steps in ascending order
    only: a point that came too late would be missing for ever.
    """
    known = []
    for stage in run.stages():
        if stage["kind"] == "personalise":
            continue
        known.append((stage["kind"], stage["method"], stage["seed"]))
        if not _done(run, stage):
            break
    rows = metrics.set_index(["stage", "method", "seed"]).index.isin(known)
    return metrics[rows]


def is_complete(run: RunFolder) -> bool:
    """Whether every stage is finished, so that no point will ever be added."""
    return all(_done(run, stage) for stage in run.stages())


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
    from fedtailor.report.scores import AVERAGE, checked, results_table, scored_rows

    scored = scored_rows(checked(metrics))
    if scored.empty:
        return {}, scored
    table = results_table(scored)
    summary = {}
    for row in table[table["language"] == AVERAGE].to_dict("records"):
        budget = f"/r{row['budget']}" if row["budget"] >= 0 else ""
        summary[f"final/{row['pool']}/{row['method']}{budget}/{row['metric']}"] = float(row["mean"])
    return summary, table


def _done(run: RunFolder, stage: Mapping[str, Any]) -> bool:
    return run.storage.exists(f"artifacts/{stage['artifact']}/{DONE}")


def sync_run(run: RunFolder, config: WandbConfig, mode: str | None = None) -> str:
    """Rebuilds the W&B run of an experiment from its committed Parquet files.

    Args:
        run: its folder.
        config: project, entity, group, tags, what to add, how long to wait.
        mode: ``offline`` writes ``<run>/wandb/offline-run-*`` in place of the one before; ``online`` adds
            what the server's run does not have yet; ``auto`` is online if there is a key. Default: the
            configuration's, and auto where that is disabled.

    Returns:
        The folder, or the address of the run.

    Raises:
        ConfigError: another mode, or no key for ``online``.
        StorageError: nothing is committed yet, another process syncs this run, or the storage is not local.
        TrackingError: W&B did not take it.
    """
    chosen = settled_mode(mode or ("auto" if config.mode == "disabled" else config.mode))
    metrics = run.metrics()
    if metrics.empty:
        raise StorageError(f"run '{run.run_id}' has no committed metrics yet")
    if chosen == "offline" and not run.storage.is_local:
        raise StorageError(f"{run.storage.url} is not a local folder: W&B can only be fed online from there")
    key = api_key() if chosen == "online" else None
    # Two at once would both send what the server lacks.
    with Lock(run.storage, f"{run.run_id}/wandb.lock", run.run_id):
        if run.storage.is_local:
            _sweep(run.storage.local_path(run.run_id))
        work = _new_work(run)
        try:
            url = _write(run, metrics, config, chosen, work, key)
            return url if chosen == "online" else str(_replace(run.storage.local_path(run.run_id) / "wandb", work))
        finally:
            shutil.rmtree(work, ignore_errors=True)


def identity(run: RunFolder) -> str:
    """Id of the W&B run: the same for every sync of an experiment."""
    info = run.info()
    return short_hash([run.run_id, info["created"], info["config"]])


def _write(run: RunFolder, metrics: pd.DataFrame, config: WandbConfig, mode: Mode, work: Path, key: str | None) -> str:
    import wandb

    asked = run.info()["config"]
    group = config.group or f"{asked['task']['name']} x {asked['model']['name']}"
    with session(Identity(identity(run), run.run_id, group, asked), config, mode, work, key) as opened:
        step = 0
        # Steps are numbered here and grow; a resumed run says which one it lacks, so nothing is logged twice.
        for step, point in enumerate(series(settled(run, metrics)), 1):
            if step >= opened.starting_step:
                opened.log(point, step=step)
        summary, table = final_results(metrics)
        if len(table):
            plain = table.astype(object).where(table.notna(), None)
            # In the summary, which is replaced; in the history it would take a step that later rounds need.
            opened.summary["results"] = wandb.Table(columns=list(plain.columns), data=plain.to_numpy())
        opened.summary.update(summary)
        if config.artifacts and is_complete(run):
            add_extras(run, opened, config, mode, step + 1, work)
        return str(opened.url) if mode == "online" else ""


def _new_work(run: RunFolder) -> Path:
    """A folder for wandb's own files; beside the run where its result is moved there as a whole."""
    beside = run.storage.local_path(run.run_id) if run.storage.is_local else None
    return Path(tempfile.mkdtemp(prefix=_WORK, dir=beside))


def _sweep(folder: Path) -> None:
    """Removes what killed syncs left; the caller holds the lock."""
    for left in folder.glob(f"{_WORK}*"):
        shutil.rmtree(left, ignore_errors=True)


def _replace(place: Path, work: Path) -> Path:
    """Puts the one offline run of ``work`` in the place of whatever was there."""
    written = list((work / "wandb").glob("offline-run-*"))
    if len(written) != 1:
        raise StorageError(f"W&B wrote {len(written)} offline runs instead of one")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return written[0].rename(place / written[0].name)


def sync_wandb(run: RunFolder, exp: ExperimentBase) -> str | None:
    """Feeds W&B if the configuration says so; returns what went wrong instead of failing the run."""
    if exp.wandb.mode == "disabled":
        return None
    try:
        place = sync_run(run, exp.wandb)
    except Exception as error:  # W&B lets errors of many libraries through, and none may fail a committed run
        problem = str(error) if isinstance(error, TailorError) else scrub(f"{type(error).__name__}: {error}")
        run.event({"kind": "wandb", "state": "failed", "text": problem})
        return problem
    run.event({"kind": "wandb", "state": "synced", "place": place})
    return None
