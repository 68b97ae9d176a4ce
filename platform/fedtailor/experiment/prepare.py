"""Everything that can be found wrong with an experiment before its run exists; nothing is left behind if it is."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import torch

from fedtailor.core.config import deviations
from fedtailor.core.errors import ConfigError, PlacementError, StorageError
from fedtailor.experiment.config import ExperimentBase, base_seed, overrides_of, stored_experiment, to_json
from fedtailor.experiment.inputs import make_inputs
from fedtailor.experiment.rules import check_weights
from fedtailor.experiment.stages import device_of
from fedtailor.federated.pool import OnEvent
from fedtailor.models.hub import check_available
from fedtailor.storage.artifacts import Artifacts
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks.prompts import check_name
from fedtailor.tracking.wandb_key import check_wandb

_COPIES, _COPY = "working_dir_files", "_ray_pkg_"
"""Where Ray unpacks the working directories of jobs, ``runtime_resources/working_dir_files/_ray_pkg_HASH``."""

_FREE = ("storage", "wandb", "engine.address")
"""Keys that may change between two starts of one run."""


def prepare(exp: ExperimentBase, run_id: str, emit: OnEvent) -> RunFolder:
    """Checks the surroundings, cheapest first, prepares the data, then makes or reopens the run's folder.

    Raises:
        TailorError: what is wrong with run id, GPUs, model or data.
    """
    refuse_job_folder("storage", exp.storage)
    storage = Storage(exp.storage)
    refuse_other_configuration(storage, run_id, exp)
    check_placement(exp)
    check_wandb(exp.wandb, exp.save_adapters)
    check_available(exp.model, exp.task.max_length, exp.task_entry.kind)
    check_weights(exp)
    if exp.task_entry.kind == "generation":
        check_name(exp.task.template)
    prepare_data(exp, emit)
    return RunFolder.create(storage, run_id, to_json(exp), overrides_of(exp), ignore=_FREE)


def refuse_job_folder(key: str, url: str | os.PathLike[str]) -> None:
    """Refuses to keep results in a job's copy of the code.

    Args:
        key: what named the place, for the message.
        url: local folder, relative ones are meant from here, or any other URL.

    Raises:
        ConfigError: names the key, the place and what to give instead.
    """
    storage = Storage(url)
    if not storage.is_local:
        return
    place = storage.local_path().resolve()
    if any(folder.name.startswith(_COPY) and folder.parent.name == _COPIES for folder in (place, *place.parents)):
        raise ConfigError(
            f"'{key}': {os.fspath(url)} lies in this Ray job's copy of the working directory ({place}), which Ray "
            "deletes; give a folder that all nodes see, e.g. /shared/runs"
        )


def refuse_other_configuration(storage: Storage, run_id: str, exp: ExperimentBase) -> None:
    """Refuses a run id that belongs to another experiment.

    Raises:
        StorageError: names the keys that differ.
    """
    if not storage.exists(f"{run_id}/run.json"):
        return
    stored = RunFolder.open(storage, run_id).info()["config"]
    changed: dict[str, tuple[Any, Any]] = {"code": (stored.get("code", {}), dict(exp.code))}
    if changed["code"][0] == changed["code"][1]:  # code of another run is not imported to be compared
        changed = {k: v for k, v in deviations(exp, stored_experiment(stored)).items() if not k.startswith(_FREE)}
    if changed:
        told = "; ".join(f"{key} is {before!r} there and {now!r} here" for key, (before, now) in changed.items())
        raise StorageError(f"run id '{run_id}' belongs to another configuration: {told}. Choose another --run-id")


def check_placement(exp: ExperimentBase) -> None:
    """Refuses GPUs that a local run cannot have; a cluster that is joined is asked when actors are placed.

    Raises:
        PlacementError: with what is asked and what is there.
    """
    engine = exp.engine
    if device_of(exp) == "cpu" or (engine.address or os.environ.get("RAY_ADDRESS", "local")) != "local":
        return
    sizes = [torch.cuda.get_device_properties(i).total_memory / 1e9 for i in range(torch.cuda.device_count())]
    if engine.memory_gb is not None:
        asked = f"engine.memory_gb={engine.memory_gb:g}"
        capacity = sum(int(size / engine.memory_gb) for size in sizes)
    else:
        asked, share = f"engine.num_gpus={engine.num_gpus:g}", engine.num_gpus
        capacity = int(len(sizes) / share) if share >= 1 else len(sizes) * int(1 / share)
    ranks = engine.zero.ranks
    wanted = (engine.actors or 1) * ranks
    if capacity < wanted:
        gpus = ", ".join(f"{size:.1f} GB" for size in sizes) or "none"
        who = f"{wanted} actor(s)" if ranks == 1 else f"{wanted} process(es) (engine.zero.ranks={ranks} of each actor)"
        lower = "engine.actors or the share" if ranks == 1 else "engine.zero.ranks or engine.actors"
        raise PlacementError(
            f"{asked} for {who} cannot be placed: this machine's GPUs ({gpus}) hold {capacity}. "
            f"Lower {lower}, use engine.num_gpus=0, or join a cluster with engine.address"
        )


def prepare_data(exp: ExperimentBase, emit: OnEvent) -> None:
    """Makes the inputs of all seeds, named by content; if that fails, folders made for them go again.

    Raises:
        DataError, ModelError, StorageError: see `experiment.inputs.make_inputs`.
    """
    storage = Storage(exp.storage)
    if storage.url.startswith("memory:") and exp.engine.backend != "serial":
        raise ConfigError(
            f"'storage' = {storage.url}: its files live in one process, and engine.backend={exp.engine.backend} "
            "runs in several; use engine.backend=serial, a folder or an object store"
        )
    artifacts = Artifacts(storage, "preparing", on_wait=lambda text: emit({"kind": "waiting", "text": text}))
    new = [folder for folder in (artifacts.folder, *artifacts.folder.parents) if not folder.exists()]
    try:
        for seed in dict.fromkeys(base_seed(exp, seed) for seed in exp.seeds):
            emit({"kind": "stage", "stage": f"data/seed{seed}", "state": "checking"})
            make_inputs(exp, seed, artifacts)
    except BaseException:
        for folder in new:
            with suppress(OSError):
                folder.rmdir()  # removes what is empty only
        raise
