"""Which clients a run has, told by content: the data artifact that its stages were computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedtailor.core.errors import ConfigError
from fedtailor.runs.experiment import ExperimentBase, base_seed, scaled_task, to_json
from fedtailor.runs.inputs import tokens_artifact
from fedtailor.runs.launch import load_experiment
from fedtailor.runs.run_folder import RunFolder
from fedtailor.runs.storage import Storage


@dataclass(frozen=True)
class People:
    """The clients of one seed of a run.

    Args:
        hashes: client to the sha256 of its texts and labels.
        labels: class names in the order of their ids.
    """

    hashes: Mapping[str, str]
    labels: tuple[str, ...]


def people_of(run: RunFolder) -> dict[int, People]:
    """Seed to clients, for the seeds whose data artifact is in the storage and can be told.

    A run does not name its data. They are those of its task section and seed for which there are tokens of the model
    that the run started from. Where several fit and their clients differ, none is taken.
    """
    try:
        exp = load_experiment(run)
    except ConfigError:
        return {}  # of another version: what it would prepare cannot be told
    names = [name for name in run.storage.list("artifacts") if name.startswith("data-")]
    manifests = {n: run.storage.read_json(p) for n in names if run.storage.exists(p := f"artifacts/{n}/manifest.json")}
    task, models = to_json(scaled_task(exp)), _models(run)
    found = {}
    for seed in exp.seeds:
        own = base_seed(exp, seed)
        fitting = [
            People({str(c["id"]): str(c["sha256"]) for c in m["clients"]}, tuple(m["labels"]))
            for name, m in manifests.items()
            if m["seed"] == own
            and all(task.get(key) == value for key, value in m["config"].items())
            and _tokenised(run.storage, exp, name, models.get(own))
        ]
        if fitting and all(one == fitting[0] for one in fitting):
            found[seed] = fitting[0]
    return found


def _models(run: RunFolder) -> dict[int, str]:
    """Seed of the partition to the artifact of the model that everything of this seed started from."""
    return {int(s["seed"]): str(s["parent"]) for s in run.stages() if str(s.get("parent", "")).startswith("model-")}


def _tokenised(storage: Storage, exp: ExperimentBase, data: str, model: str | None) -> bool:
    return model is not None and storage.exists(f"artifacts/{tokens_artifact(exp, data, model)}")
