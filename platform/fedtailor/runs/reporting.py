"""From a run folder to its report: gathers what `runs.report` is told."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from fedtailor.core.errors import StorageError
from fedtailor.runs.digest import DONE
from fedtailor.runs.report import gather, write_report
from fedtailor.runs.run_folder import RunFolder
from fedtailor.runs.storage import join

PAGE = "report.html"


def report_of(run: RunFolder, out: Path | None = None) -> Path | str:
    """Writes a run's report and returns its page.

    Args:
        run: at least one round of it is committed.
        out: new local folder; None: ``<run>/report/`` anew, on a remote storage by uploading it.

    Raises:
        StorageError: nothing is committed yet, or ``out`` is not empty.
    """
    if out is not None:
        refuse_used(out)
        return _write(run, out)
    path = join(run.run_id, "report")
    if run.storage.is_local:
        return _write(run, run.storage.local_path(path))
    with TemporaryDirectory() as made:
        page = _write(run, Path(made))
        run.storage.delete(path)
        # The page last: whoever finds it finds what it shows.
        for file in sorted(Path(made).rglob("*"), key=lambda file: (file == page, file)):
            if file.is_file():
                run.storage.upload(file, join(path, file.relative_to(made).as_posix()))
    return f"{run.storage.url.rstrip('/')}/{path}/{PAGE}"


def refuse_used(out: Path) -> None:
    """Keeps ``--out`` from mixing with what is there.

    Raises:
        StorageError: the folder is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"--out {out} is there already and not an empty folder")


def _write(run: RunFolder, out: Path) -> Path:
    metrics = run.metrics()
    if metrics.empty:
        raise StorageError(f"run '{run.run_id}' has committed nothing yet that could be reported")
    warnings = [event for event in run.events() if event.get("kind") == "warning"]
    facts = {
        **run.info(), "status": run.status()["state"], "failures": run.failures(), "warnings": warnings,
    }  # fmt: skip
    write_report(facts, metrics, run.strategies(), modules_of(run), out, gather(run))
    return out / PAGE


def modules_of(run: RunFolder) -> tuple[str, ...]:
    """The adapted linear layers, from the first finished stage that names them."""
    for stage in run.stages():
        path = f"artifacts/{stage['artifact']}/{DONE}"
        if run.storage.exists(path) and (found := run.storage.read_json(path)["modules"]):
            return tuple(str(name) for name in found)
    return ()
