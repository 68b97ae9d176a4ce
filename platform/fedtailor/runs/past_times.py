"""How long clients took in earlier runs of the same task and model, for estimates."""

from __future__ import annotations

from fedtailor.runs.experiment import ExperimentBase
from fedtailor.runs.run_folder import RunFolder, run_ids
from fedtailor.runs.storage import Storage

LOOKED_AT = 20


def seconds_per_client(exp: ExperimentBase) -> dict[tuple[str, str], float]:
    """Mean wall seconds per client, by (stage kind, method), from the newest such runs in the storage."""
    storage = Storage(exp.storage)
    found: dict[tuple[str, str], float] = {}
    runs = [RunFolder.open(storage, run_id) for run_id in run_ids(storage)]
    runs.sort(key=lambda run: str(run.info()["created"]), reverse=True)
    for run in runs[:LOOKED_AT]:
        config = run.info()["config"]
        if not _alike(exp, config):
            continue
        methods = {stage["key"]: (stage["kind"], stage["method"]) for stage in run.stages()}
        for stage, rows in run.timings().groupby("stage"):
            if stage in methods:
                found.setdefault(methods[str(stage)], float(rows["seconds"].mean()))
    return found


def _alike(exp: ExperimentBase, config: dict[str, dict[str, object]]) -> bool:
    same = (exp.task.name, exp.task.max_length, exp.model.name, exp.engine.dtype)
    task, model, engine = config["task"], config["model"], config["engine"]
    return same == (task["name"], task["max_length"], model["name"], engine["dtype"])
