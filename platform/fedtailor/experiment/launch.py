"""Runs an experiment on a backend and keeps the run's status in step with what happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from fedtailor.core.config import resolve
from fedtailor.core.errors import ConfigError, Interrupted, LockedError, StorageError, TailorError
from fedtailor.core.outside import module_of
from fedtailor.core.settings import EngineConfig
from fedtailor.experiment.config import ExperimentBase, stored_experiment, to_json
from fedtailor.experiment.execute import Execution
from fedtailor.experiment.stages import short_hash
from fedtailor.federated.pool import OnEvent, Pool
from fedtailor.methods.external import add_stored, allow
from fedtailor.storage.digest import committed_stages
from fedtailor.storage.files import Storage
from fedtailor.storage.lock import LockHolder
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tracking.events import QUIET
from fedtailor.tracking.progress import ProgressFile
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


class InProcess:
    """Sink and flag of a run that is driven in this process."""

    def __init__(self, emit: OnEvent, should_stop: ShouldStop) -> None:
        self.event, self.is_set = emit, should_stop


def run_serial(
    entry: str, payload: Mapping[str, Any], config: EngineConfig, on_event: OnEvent, should_stop: ShouldStop
) -> None:
    """The backend without Ray: everything in this process. Arguments: `actors.driver_actor.run_on_driver`."""
    here = InProcess(on_event, should_stop)
    resolve(entry)(payload, SerialPool, here, here)
