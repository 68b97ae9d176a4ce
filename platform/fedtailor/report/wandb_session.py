"""A W&B run that is opened, filled and closed within limits of time, and that says what did not arrive.

`add_extras` gives it what ``wandb.artifacts`` asks for: the report's figures, the report, the clients' adapters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedtailor.core.errors import TrackingError
from fedtailor.core.settings import WandbConfig
from fedtailor.storage.files import safe_path
from fedtailor.storage.provenance import redact, scrub
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tracking.wandb_key import Mode

ADAPTERS: Final = "adapters/"

_LOST: Final = ("filestream: fatal error", "sender: failed", "file transfer: upload", "runfiles:")
"""Beginnings of what wandb-core writes to its log alone when it gives something up; `finish` returns as ever."""

_QUIET: Final = {"console": "off", "silent": True, "disable_git": True, "save_code": False}

_PRIVATE: Final = {
    "x_disable_stats": True, "x_disable_meta": True, "x_disable_machine_info": True, "x_save_requirements": False,
}  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """Which run it is.

    Args:
        id: the same for every sync of an experiment.
        name: shown.
        group: runs of one group are folded together.
        config: what the run was asked for, secrets hidden.
    """

    id: str
    name: str
    group: str
    config: Mapping[str, Any]


@contextmanager
def session(who: Identity, wandb_config: WandbConfig, mode: Mode, work: Path, key: str | None) -> Iterator[Any]:
    """Opens a W&B run, resumed if the server has it, and closes it after the block.

    Args:
        who: which run.
        wandb_config: project, entity, tags, and ``timeout_s`` for the beginning and again for the end.
        mode: offline or online.
        work: new folder for wandb's own files.
        key: for online.

    Raises:
        TrackingError: the server cannot be reached, refuses the key, is too slow, or did not take everything.
    """
    try:
        opened = _open(who, wandb_config, mode, work, key)
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
        raise TrackingError(_message(error, wandb_config.timeout_s)) from error
    if lost := _given_up(work):
        raise TrackingError(f"W&B did not take everything: {lost}")


def _open(who: Identity, config: WandbConfig, mode: Mode, work: Path, key: str | None) -> Any:
    import wandb

    limit = config.timeout_s
    limits = {"init_timeout": limit, "finish_timeout": limit, "finish_timeout_raises": True}
    try:
        opened = wandb.init(
            mode=mode, project=config.project, entity=config.entity, dir=str(work), id=who.id, name=who.name,
            group=scrub(who.group), tags=[scrub(tag) for tag in config.tags], job_type=redact(config.job_type),
            config=dict(who.config), resume="allow", reinit="create_new",
            settings=wandb.Settings(**_QUIET, **_PRIVATE, **limits, **({"api_key": key} if key else {})),
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


def add_extras(run: RunFolder, opened: Any, config: WandbConfig, mode: Mode, step: int, work: Path) -> None:
    """Adds what ``wandb.artifacts`` names.

    Args:
        run: its folder.
        opened: W&B run.
        config: ``artifacts`` says what.
        mode: offline, only figures are added: the rest lies beside them anyway.
        step: of the figures; above all others.
        work: folder for copies.

    Raises:
        StorageError: a committed file is damaged.
    """
    wanted = set(config.artifacts)
    if wanted & {"figures", "report"}:
        report = _report(run, work)
        if "figures" in wanted:
            _figures(opened, report, step)
        if "report" in wanted and mode == "online":
            _folder(opened, f"report-{opened.id}", "report", report)
    if "adapters" in wanted and mode == "online":
        _adapters(run, opened, work / "adapters")


def _report(run: RunFolder, work: Path) -> Path:
    from fedtailor.report import report_of

    if not run.storage.is_local:
        return Path(report_of(run, work / "report")).parent
    folder = run.storage.local_path(f"{run.run_id}/report")
    if not (folder / "report.html").exists():
        report_of(run)
    return folder


def _figures(opened: Any, report: Path, step: int) -> None:
    import wandb

    found = {f"figures/{path.stem}": wandb.Image(str(path)) for path in sorted(report.rglob("*.png"))}
    if found and step >= opened.starting_step:
        opened.log(found, step=step)


def _adapters(run: RunFolder, opened: Any, work: Path) -> None:
    for stage in run.stages("personalise"):
        name = f"{stage['method']}-seed{stage['seed']}-{opened.id}"
        place = work / name
        for commit in run.log(stage).all(objects=False):
            for file in (file for file in commit.objects if file.startswith(ADAPTERS)):
                target = place / safe_path(file.removeprefix(ADAPTERS))
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(commit.bytes(file))
        if place.exists():
            _folder(opened, f"adapters-{name}", "adapters", place)


def _folder(opened: Any, name: str, kind: str, folder: Path) -> None:
    import wandb

    artifact = wandb.Artifact(name, type=kind)
    artifact.add_dir(str(folder))
    opened.log_artifact(artifact)
