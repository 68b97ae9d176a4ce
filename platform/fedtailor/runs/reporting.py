"""From a run folder to its report: gathers what `runs.report` is told."""

from __future__ import annotations

from pathlib import Path

from fedtailor.core.errors import StorageError
from fedtailor.runs.digest import DONE
from fedtailor.runs.report import gather, write_report
from fedtailor.runs.run_folder import RunFolder


def report_of(run: RunFolder) -> Path:
    """Writes ``<run>/report/`` anew and returns its page.

    Raises:
        StorageError: nothing is committed yet, or the storage is not local.
    """
    metrics = run.metrics()
    if metrics.empty:
        raise StorageError(f"run '{run.run_id}' has committed nothing yet that could be reported")
    warnings = [event for event in run.events() if event.get("kind") == "warning"]
    facts = {
        **run.info(), "status": run.status()["state"], "failures": run.failures(), "warnings": warnings,
    }  # fmt: skip
    out = run.storage.local_path(f"{run.run_id}/report")
    write_report(facts, metrics, run.strategies(), modules_of(run), out, gather(run))
    return out / "report.html"


def modules_of(run: RunFolder) -> tuple[str, ...]:
    """The adapted linear layers, from the first finished stage that names them."""
    for stage in run.stages():
        path = f"artifacts/{stage['artifact']}/{DONE}"
        if run.storage.exists(path) and (found := run.storage.read_json(path)["modules"]):
            return tuple(str(name) for name in found)
    return ()
