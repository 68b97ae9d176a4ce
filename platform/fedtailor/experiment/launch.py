"""Prepares a run, starts it on a backend, keeps its status.

Runs an experiment on a backend and keeps the run's status in step with what happens.

Everything that can be found wrong before a run exists; nothing is left behind if it is.

The working directory of a Ray job is a copy that Ray deletes, so no result may be kept in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from fedtailor.core.config import deviations, resolve
from fedtailor.core.errors import ConfigError, Interrupted, LockedError, PlacementError, StorageError, TailorError
from fedtailor.core.outside import module_of
from fedtailor.core.settings import EngineConfig
from fedtailor.experiment.config import ExperimentBase, base_seed, overrides_of, stored_experiment, to_json
from fedtailor.experiment.execute import Execution
from fedtailor.experiment.inputs import make_inputs
from fedtailor.experiment.rules import check_weights
from fedtailor.experiment.stages import device_of, short_hash
from fedtailor.federated.pool import OnEvent, Pool
from fedtailor.methods.external import add_stored, allow
from fedtailor.models.hub import check_available
from fedtailor.storage.artifacts import Artifacts
from fedtailor.storage.digest import committed_stages
from fedtailor.storage.files import Storage
from fedtailor.storage.lock import LockHolder
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks.prompts import check_name
from fedtailor.tracking.events import QUIET
from fedtailor.tracking.throughput import ProgressFile
from fedtailor.tracking.wandb_key import check_wandb
from fedtailor.worker.worker import SerialPool

MakePool = Callable[[EngineConfig, OnEvent], Pool]

ShouldStop = Callable[[], bool]

Backend = Callable[[str, Mapping[str, Any], EngineConfig, OnEvent, ShouldStop], Any]

ENTRY = "fedtailor.experiment.launch:execute_on"


class EventSink(Protocol):
    """Takes events from wherever the run is driven."""

    def event(self, event: dict[str, Any]) -> None:
        """Takes one event."""


class StopFlag(Protocol):
    """Says whether the run should stop, e.g. `threading.Event`."""

    def is_set(self) -> bool:
        """Whether to stop."""


def load_experiment(run: RunFolder) -> ExperimentBase:
    """The configuration that a run folder holds, with the storage it was found in.

    Raises:
        ConfigError: the run has a method from outside that is neither installed nor allowed.
    """
    config = run.info()["config"]
    add_stored(config.get("code", {}), run.run_id)
    return stored_experiment({**config, "storage": run.storage.url})


def modules_of(exp: ExperimentBase) -> list[str]:
    """Modules of the methods from outside."""
    return sorted({module_of(reference) for reference in exp.code.values()})


def default_run_id(presets: list[str], exp: ExperimentBase) -> str:
    """Preset names (or the task) and a hash of the configuration: the same words find the same run again."""
    content = to_json(exp)
    for key in ("storage", "wandb"):
        content.pop(key)
    content["engine"]["address"] = None
    names = [Path(name).stem if name.endswith(".yaml") else name for name in presets]
    return f"{'-'.join(names) or exp.task.name}-{short_hash(content)[:8]}"


def at_address(exp: ExperimentBase, address: str | None, instead: bool = False) -> ExperimentBase:
    """The experiment on the cluster that ``--address`` names; unchanged if that is None.

    Args:
        exp: checked configuration.
        address: as ``engine.address``.
        instead: of the address in ``exp``, which otherwise must be the same or none.

    Raises:
        ConfigError: there are two addresses, or the engine uses no Ray.
    """
    if address is None:
        return exp
    engine = exp.engine
    if engine.backend == "serial":
        raise ConfigError(f"--address={address}: 'engine.backend' is serial, which uses no Ray cluster")
    if not instead and engine.address not in (None, address):
        raise ConfigError(f"--address={address} and 'engine.address'={engine.address} differ: give one")
    return exp.model_copy(update={"engine": engine.model_copy(update={"address": address})})


def launch(backend: Backend, run: RunFolder, exp: ExperimentBase, emit: OnEvent, should_stop: ShouldStop) -> None:
    """Runs what is missing of a run.

    Raises:
        TailorError: what ended the run; its status says so too.
        StorageError: the backend returned and yet a stage is not committed.
    """
    before, me = run.status(), LockHolder.here(run.run_id)
    run.set_status("running", "", {"launcher": asdict(me)})
    try:
        payload = {"storage": exp.storage, "run_id": run.run_id, "allow_code": modules_of(exp)}
        backend(ENTRY, payload, exp.engine, emit, should_stop)
        missing = [stage["key"] for stage in committed_stages(run) if not stage["done"]]
        if missing:
            raise StorageError(f"not everything that was asked for is committed: {', '.join(missing)}")
    except LockedError:
        _give_back_status(run, before, me)
        raise
    except BaseException as error:
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        told = str(error) if isinstance(error, TailorError) else f"{type(error).__name__}: {error}"
        run.set_status("interrupted" if stopped else "failed", told)
        raise
    run.set_status("complete", "")


def _give_back_status(run: RunFolder, before: Mapping[str, Any], me: LockHolder) -> None:
    """Undoes our "running": the run is another process's, and what that says about itself counts."""
    found = run.status()["progress"].get("launcher", {})
    if (found.get("machine"), found.get("pid")) == (me.machine, me.pid):
        run.set_status(before["state"], before["message"], before["progress"])


def execute_on(payload: Mapping[str, Any], make_pool: MakePool, sink: EventSink, stop: StopFlag) -> None:
    """Runs all stages of a run in this process; the pool may be anywhere.

    Args:
        payload: ``storage``, ``run_id`` and ``allow_code``, the modules that whoever asks has allowed.
        make_pool: builds a pool from the engine's configuration.
        sink: receives every event as it is kept in the run folder, and those of `events.QUIET`, which are not.
        stop: looked at between segments.

    Raises:
        TailorError: what ended the run; commits made before it stay.
    """
    allow(payload["allow_code"])
    run = RunFolder.open(Storage(payload["storage"]), payload["run_id"])
    exp = load_experiment(run)
    progress = ProgressFile(run)

    def emit(event: dict[str, Any]) -> None:
        told = run.shown(event) if event["kind"] in QUIET else run.event(event)
        progress(event)
        sink.event(told)

    def pool(on_event: OnEvent) -> Pool:
        return make_pool(exp.engine, on_event)

    Execution(exp, run, pool, emit, stop.is_set).execute()


class Here:
    """Sink and flag of a run that is driven in this process."""

    def __init__(self, emit: OnEvent, should_stop: ShouldStop) -> None:
        self.event, self.is_set = emit, should_stop


def run_serial(
    entry: str, payload: Mapping[str, Any], config: EngineConfig, on_event: OnEvent, should_stop: ShouldStop
) -> None:
    """The backend without Ray: everything in this process. Arguments: `actors.driver_actor.run_on_driver`."""
    here = Here(on_event, should_stop)
    resolve(entry)(payload, SerialPool, here, here)


_COPIES, _COPY = "working_dir_files", "_ray_pkg_"
"""Where Ray unpacks the working directories of jobs, ``runtime_resources/working_dir_files/_ray_pkg_HASH``."""


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
    import torch

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
