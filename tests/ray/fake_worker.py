"""A worker without a model, whose numbers are known and whose faults are ordered by the stage's config."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from fedtailor.core.errors import ClientError, Interrupted
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult, StageInfo, StageSpec, metric_row
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.core.settings import EngineConfig
from fedtailor.federated.pool import OnEvent

WIDTH = 4


def stage(folder: Path, **faults: Any) -> StageSpec:
    """A stage whose config names a fault, e.g. ``kill=[2]``: die once in segment 2."""
    return StageSpec(
        key="strategy/fake/seed1", kind="rounds", method="fake", seed=1,
        method_config={"folder": str(folder), **faults}, model_dir="", data_dir="", r_max=8,
    )  # fmt: skip


class FakeWorker:
    """Sums one random vector per client, in client order; float32, so that any other order shows."""

    def __init__(self) -> None:
        self._spec: StageSpec | None = None

    def open(self, spec: StageSpec) -> StageInfo:
        self._spec = spec
        config = spec.method_config
        if config.get("kill_open") and self._first("open"):
            os.kill(os.getpid(), signal.SIGKILL)
        if config.get("always_kill_open"):
            os.kill(os.getpid(), signal.SIGKILL)
        initial = np.full(WIDTH, os.getpid() if config.get("unequal") else 0, np.float32)
        return StageInfo((ParamSpec("w", (WIDTH,), Scope.SHARED),), (), initial, ("w",), 0)

    def run(self, job: SegmentJob, shared: FloatArray | None) -> SegmentResult:
        assert self._spec is not None
        config = self._spec.method_config
        with open(Path(config["folder"]) / "runs", "a") as log:
            log.write(f"{job.round} {job.index} {job.attempt}\n")
        time.sleep(config.get("sleep", 0.0))
        self._misbehave(job, config)
        result = SegmentResult(job.stage, job.round, job.index, job.attempt, partial=np.zeros(WIDTH, np.float32))
        for client in job.clients:
            rng = np.random.default_rng([job.round, *client.encode()])  # without torch, which takes seconds to import
            value = rng.normal(size=WIDTH).astype(np.float32)
            result.partial = result.partial + value + (0 if shared is None else shared)
            result.metrics.append(metric_row(client=client, value=float(value[0])))
            result.private[client] = job.private.get(client, np.zeros(1, np.float32)) + 1
            result.seconds[client] = 0.05  # long enough for a call of its own
        result.valid = job.clients
        if job.index in config.get("kill_after", ()) and self._first(f"after-{job.round}-{job.index}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def _misbehave(self, job: SegmentJob, config: Mapping[str, Any]) -> None:
        tag = f"{job.round}-{job.index}"
        if job.index in config.get("kill", ()) and self._first(f"kill-{tag}"):
            os.kill(os.getpid(), signal.SIGKILL)
        if job.index in config.get("always_kill", ()):
            os.kill(os.getpid(), signal.SIGKILL)
        if job.index in config.get("hang", ()) and self._first(f"hang-{tag}"):
            _wait_for_godot()
        if job.index in config.get("freeze", ()) and self._first(f"freeze-{tag}"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if job.round == 0 and job.index in config.get("client_error", ()):
            raise ClientError(job.clients[0], job.stage, job.round, "no examples")
        if job.round == 0 and job.index in config.get("slow", ()):
            time.sleep(1.0)
        if job.index in config.get("bug", ()):
            raise ZeroDivisionError("a mistake in method code")

    def _first(self, name: str) -> bool:
        """Whether no process has been here before."""
        assert self._spec is not None
        try:
            (Path(self._spec.method_config["folder"]) / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def _wait_for_godot() -> None:
    time.sleep(1000)


def merge(parts: Sequence[SegmentResult]) -> SegmentResult:
    """Adds single-client results in the order given."""
    whole = replace(parts[0], partial=sum((part.partial for part in parts[1:]), parts[0].partial))
    whole.metrics = [row for part in parts for row in part.metrics]
    whole.private = {name: row for part in parts for name, row in part.private.items()}
    whole.valid = tuple(name for part in parts for name in part.valid)
    return whole


def drive(payload: Mapping[str, Any], make_pool: Any, on_event: OnEvent, should_stop: Callable[[], bool]) -> Any:
    """A run for `DriverActor`: does what ``payload["do"]`` says."""
    what = payload["do"]
    if what == "count":
        for i in range(payload["events"]):
            on_event({"number": i})
        return payload["events"]
    if what == "wait for stop":
        on_event({"event": "ready", "driver": os.getpid()})
        if not stopped(should_stop):
            return "nobody asked"
        raise Interrupted("stopped at a commit")
    if what == "fail":
        raise ClientError("seen/amh/00", "base/seed1", 3, "no examples")
    if what == "pool":
        pool = make_pool(EngineConfig(actors=2, num_cpus=0.5), on_event, worker="fake_worker:FakeWorker")
        pool.open(stage(Path(payload["folder"])))
        while len(pool.hosts()) < 2:
            pool.run([SegmentJob("strategy/fake/seed1", 0, 0, ("a",))], None, lambda _: None)
        on_event({"driver": os.getpid(), "clients": [host.pid for host in pool.hosts()]})
        stopped(should_stop)
    return None


def stopped(should_stop: Callable[[], bool]) -> bool:
    """Whether a stop is asked for within half a minute."""
    until = time.monotonic() + 30
    while not should_stop() and time.monotonic() < until:
        time.sleep(0.02)
    return should_stop()


def play_in_bundles(folder: str) -> tuple[int, int, float]:
    """What a Tune trial does: a pool inside its placement group. Pool size, rounds played, CPUs left."""
    from actors.ray_pool import RayPool

    pool = RayPool(EngineConfig(num_cpus=0.25), print, worker="fake_worker:FakeWorker")
    pool.open(stage(Path(folder)))
    rounds = 0
    while len(pool.hosts()) < pool.size:
        rounds += len(pool.run([SegmentJob("strategy/fake/seed1", 0, 0, ("a",))], None, lambda _: None))
    left = ray.available_resources().get("CPU", 0.0)
    size = pool.size
    pool.close()
    return size, rounds, left
