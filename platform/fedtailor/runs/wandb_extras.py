"""What a run gives to W&B on request only: the report's figures, the report, the clients' adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtailor.core.settings import WandbConfig
from fedtailor.runs.run_folder import RunFolder
from fedtailor.runs.storage import safe_path
from fedtailor.runs.wandb_key import Mode

ADAPTERS = "adapters/"


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
    from fedtailor.runs.reporting import report_of

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
