"""Runs an experiment on a backend, keeps the run's status in step with what happens, and ends it in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from fedtailor.core.config import resolve
from fedtailor.core.errors import ConfigError, Interrupted, LockedError, StorageError, TailorError
from fedtailor.core.outside import module_of
from fedtailor.core.settings import EngineConfig
from fedtailor.experiment.config import ExperimentBase, stored_experiment, to_json
from fedtailor.experiment.execute import Execution
from fedtailor.experiment.stages import short_hash
from fedtailor.federated.pool import OnEvent, Pool
from fedtailor.methods.external import add_stored, allow
from fedtailor.storage.files import Storage
from fedtailor.storage.lock import LockHolder
from fedtailor.storage.run_folder import RunFolder, committed_stages
from fedtailor.tracking.events import QUIET
from fedtailor.tracking.progress import ProgressFile

MakePool = Callable[[EngineConfig, OnEvent], Pool]
ShouldStop = Callable[[], bool]
Backend = Callable[[str, Mapping[str, Any], EngineConfig, OnEvent, ShouldStop], Any]
GRACE_S = 20.0
"""Seconds between the wish to stop and the moment when the segment under way is given up."""

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
ENTRY = "fedtailor.experiment.launch:execute_on"


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
        payload = {
            "storage": exp.storage, "run_id": run.run_id, "allow_code": modules_of(exp),
            "begin": before["state"] != "complete",
        }  # fmt: skip
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


def execute_on(payload: Mapping[str, Any], make_pool: MakePool, on_event: OnEvent, should_stop: ShouldStop) -> None:
    """Runs all stages of a run in this process; the pool may be anywhere.

    Args:
        payload: ``storage``, ``run_id`` and ``allow_code``, the modules that whoever asks has allowed; ``begin``:
            whether actors are wanted from the first moment on.
        make_pool: builds a pool from the engine's configuration.
        on_event: receives every event as it is kept in the run folder, and those of `events.QUIET`, which are not.
        should_stop: looked at between segments.

    Raises:
        TailorError: what ended the run; commits made before it stay.
    """
    allow(payload["allow_code"])
    run = RunFolder.open(Storage(payload["storage"]), payload["run_id"])
    exp = load_experiment(run)
    progress = ProgressFile(run)

    def emit(event: dict[str, Any]) -> None:
        told = run.events.stamped(event) if event["kind"] in QUIET else run.events.append(event)
        progress(event)
        on_event(told)

    Execution(exp, run, partial(make_pool, exp.engine), emit, should_stop).execute()


def run_serial(
    entry: str, payload: Mapping[str, Any], config: EngineConfig, on_event: OnEvent, should_stop: ShouldStop
) -> None:
    """The backend without Ray: everything in this process. Arguments: `actors.driver_actor.run_on_driver`."""
    from fedtailor.worker.worker import SerialPool  # a driver of actors needs no worker

    resolve(entry)(payload, SerialPool, on_event, should_stop)


@dataclass
class StopSignals:
    """Asks whether somebody wants the run to stop: ``with StopSignals(tell) as stop: ... stop()``.

    After ``grace_s`` the segment under way is given up, as it is at a second signal; commits stay valid.

    Args:
        tell: shows a sentence when the first signal comes.
        grace_s: seconds.
        graceful: False until there is a run to stop; before that the first signal ends at once.
        number: the first signal that came.
    """

    tell: Callable[[str], None]
    grace_s: float = GRACE_S
    graceful: bool = False
    number: int | None = None
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> StopSignals:
        """Takes over the signals."""
        for number in WATCHED:
            self._before[number] = signal.getsignal(number)
        self._take_over()
        return self

    def __exit__(self, *_: object) -> None:
        """Gives them back."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether to stop."""
        self._take_over()
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.number or signal.SIGINT)

    def _take_over(self) -> None:
        """Installs the handlers; again, since starting Ray in this process puts its own in their place."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in WATCHED:
            if signal.getsignal(number) != self._received:
                signal.signal(number, self._received)

    def _received(self, number: int, _: FrameType | None) -> None:
        first, self.number = self.number is None, self.number or number
        if first and self.graceful:
            signal.setitimer(signal.ITIMER_REAL, self.grace_s)
            self.tell("stopping at the next segment; once more (Ctrl-C) stops at once")
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise Interrupted("stopped at once: what is committed is kept")
