"""Weights & Biases, fed from committed metrics alone: one W&B run per experiment, rebuilt when asked for.

Curves, final results and their table are computed anew each time, and ``wandb.artifacts`` adds the report's figures,
the report, the clients' adapters. A failure costs nothing: the run folder is complete without W&B, and ``fedtailor
sync`` does it again. Opening and closing keep to limits of time, and what did not arrive is said.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fedtailor.core.errors import StorageError, TailorError, TrackingError
from fedtailor.core.settings import WandbConfig
from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.stages import short_hash
from fedtailor.storage.files import safe_path
from fedtailor.storage.lock import Lock
from fedtailor.storage.provenance import redact, scrub
from fedtailor.storage.round_store import ADAPTERS
from fedtailor.storage.run_folder import DONE, RunFolder
from fedtailor.tracking.wandb_key import Mode, api_key, settled_mode

if TYPE_CHECKING:
    import pandas as pd

_WORK: Final = ".wandb-"
_LOST: Final = ("filestream: fatal error", "sender: failed", "file transfer: upload", "runfiles:")
"""Beginnings of what wandb-core writes to its log alone when it gives something up; `finish` returns as ever."""

_SETTINGS: Final = {
    "console": "off", "silent": True, "disable_git": True, "save_code": False, "x_disable_stats": True,
    "x_disable_meta": True, "x_disable_machine_info": True, "x_save_requirements": False, "finish_timeout_raises": True,
}  # fmt: skip
"""Nothing is printed, and nothing is sent of the machine or the code."""


def settled(run: RunFolder, metrics: pd.DataFrame) -> pd.DataFrame:
    """Rows of rounds to which no later sync can add an earlier one: up to the first stage that is not finished.

    Stages may finish out of order (another run may have made one of them), and W&B takes steps in ascending order
    only: a point that came too late would be missing for ever.
    """
    known = []
    for stage in run.stages():
        if stage["kind"] != "personalise":
            known.append((stage["kind"], stage["method"], stage["seed"]))
            if not _done(run, stage):
                break
    return metrics[metrics.set_index(["stage", "method", "seed"]).index.isin(known)]


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
    with Lock(run.storage, f"{run.run_id}/wandb.lock", run.run_id), _work_folder(run) as work:
        with _session(run, config, chosen, work, key) as opened:
            points = _fill(run, metrics, opened)
            if all(_done(run, stage) for stage in run.stages()):  # no point will ever be added
                _add_artifacts(run, opened, set(config.artifacts), chosen, points + 1, work)
        if lost := _given_up(work):
            raise TrackingError(f"W&B did not take everything: {lost}")
        if chosen == "online":
            return str(opened.url)
        return str(_replace(run.storage.local_path(run.run_id) / "wandb", work))


def identity(run: RunFolder) -> str:
    """Id of the W&B run: the same for every sync of an experiment."""
    info = run.info()
    return short_hash([run.run_id, info["created"], info["config"]])


@contextmanager
def _work_folder(run: RunFolder) -> Iterator[Path]:
    """A folder for wandb's own files; beside the run where its result is moved there as a whole.

    What killed syncs left there is removed; the caller holds the lock.
    """
    beside = run.storage.local_path(run.run_id) if run.storage.is_local else None
    for left in beside.glob(f"{_WORK}*") if beside else ():
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=_WORK, dir=beside, ignore_cleanup_errors=True) as work:
        yield Path(work)


@contextmanager
def _session(run: RunFolder, config: WandbConfig, mode: Mode, work: Path, key: str | None) -> Iterator[Any]:
    """Opens a W&B run, resumed if the server has it, and closes it after the block.

    Raises:
        TrackingError: the server cannot be reached, refuses the key, or is too slow.
    """
    try:
        opened = _open(run, config, mode, work, key)
        try:
            yield opened
        except BaseException:
            opened.finish(exit_code=1)
            raise
        opened.finish()
    except Exception as error:
        # wandb has a dozen kinds of errors without a common base, and lets OSErrors through.
        if not (type(error).__module__.startswith("wandb") or isinstance(error, OSError)):
            raise
        raise TrackingError(_message(error, config.timeout_s)) from error


def _open(run: RunFolder, config: WandbConfig, mode: Mode, work: Path, key: str | None) -> Any:
    import wandb

    asked, limit = run.info()["config"], config.timeout_s
    group = config.group or f"{asked['task']['name']} x {asked['model']['name']}"
    limits = {"init_timeout": limit, "finish_timeout": limit}
    try:
        opened = wandb.init(
            mode=mode, project=config.project, entity=config.entity, dir=str(work), id=identity(run), name=run.run_id,
            group=scrub(group), tags=[scrub(tag) for tag in config.tags], job_type=redact(config.job_type),
            config=asked, resume="allow", reinit="create_new",
            settings=wandb.Settings(**_SETTINGS, **limits, **({"api_key": key} if key else {})),
        )  # fmt: skip
    except Exception:
        if wandb.run is None:  # else it would end a run of the caller's own
            wandb.teardown()  # wandb-core keeps the id of a run that it could not begin, for as long as it lives
        raise
    opened.define_metric("round")
    opened.define_metric("*", step_metric="round")
    return opened


def _message(error: Exception, limit: float) -> str:
    text = scrub(" ".join(f"{type(error).__name__}: {error}".split()))
    if "error 401" in text or "error 403" in text:
        return f"the W&B server refuses the key, or the entity is not its own ({text})"
    if isinstance(error, TimeoutError) or "deadline exceeded" in text or "timed out" in text.lower():
        return f"W&B did not answer within wandb.timeout_s = {limit:g} s ({text})"
    return text


def _given_up(work: Path) -> str:
    """What wandb-core's own log says was lost; empty if nothing was."""
    for path in sorted(work.glob("wandb/*/logs/debug-internal.log")):
        for line in path.read_text("utf-8", errors="replace").splitlines():
            entry = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
            if str(entry.get("level", "")).startswith("ERROR") and str(entry["msg"]).startswith(_LOST):
                return scrub(str(entry["msg"]))
    return ""


def _fill(run: RunFolder, metrics: pd.DataFrame, opened: Any) -> int:
    """Gives a W&B run the points that it does not have yet, and the results; returns how many points there are."""
    import wandb

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
    return step


def _add_artifacts(run: RunFolder, opened: Any, wanted: set[str], mode: Mode, step: int, work: Path) -> None:
    """Adds the figures at a step above all others; online the report and adapters too, which else lie beside them."""
    import wandb

    if wanted & {"figures", "report"}:
        report = _report(run, work / "report")
        figures = {f"figures/{path.stem}": wandb.Image(str(path)) for path in sorted(report.rglob("*.png"))}
        if "figures" in wanted and figures and step >= opened.starting_step:
            opened.log(figures, step=step)
        if "report" in wanted and mode == "online":
            artifact = wandb.Artifact(f"report-{opened.id}", type="report")
            artifact.add_dir(str(report))
            opened.log_artifact(artifact)
    for stage in run.stages("personalise") if "adapters" in wanted and mode == "online" else ():
        commits = run.log(stage).all(objects=False)
        files = [(commit, file) for commit in commits for file in commit.objects if file.startswith(ADAPTERS)]
        artifact = wandb.Artifact(f"adapters-{stage['method']}-seed{stage['seed']}-{opened.id}", type="adapters")
        for commit, file in files:
            with artifact.new_file(safe_path(file.removeprefix(ADAPTERS)), mode="wb") as target:
                target.write(commit.bytes(file))
        if files:
            opened.log_artifact(artifact)


def _report(run: RunFolder, work: Path) -> Path:
    """The folder of a run's report, made if it is not there; of a remote run, made anew in ``work``."""
    from fedtailor.report import report_of

    if not run.storage.is_local:
        return Path(report_of(run, work)).parent
    folder = run.storage.local_path(f"{run.run_id}/report")
    if not (folder / "report.html").exists():
        report_of(run)
    return folder


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
        run.events.append({"kind": "wandb", "state": "failed", "text": problem})
        return problem
    run.events.append({"kind": "wandb", "state": "synced", "place": place})
    return None
