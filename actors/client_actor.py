"""The process that plays clients: one resident model, one stage at a time, as many clients as it is sent."""

from __future__ import annotations

import faulthandler
import hashlib
import os
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from actors.metrics import ActorMetrics
from actors.placement import THREAD_VARIABLES
from fedtailor.core.config import importing, resolve
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult, StageInfo, StageSpec
from fedtailor.core.scope import Ranks

FORWARDED = (
    "FEDTAILOR_DATA", "FEDTAILOR_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "CUBLAS_WORKSPACE_CONFIG", "FEDTAILOR_FAULT",
)  # fmt: skip
"""Variables that follow the run onto a cluster that was started elsewhere. No secret is among them."""


@dataclass(frozen=True)
class Host:
    """Where an actor runs, for events and failures."""

    pid: int
    node: str
    hostname: str

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.hostname} (node {self.node[:8]})"


@dataclass(frozen=True)
class ActorSetup:
    """What the actors of a pool are started with.

    Args:
        worker: ``module:Class`` with ``open`` and ``run`` as `fedtailor.worker.worker.Worker` has them; its constructor
            takes the ranks where several processes hold a model together.
        threads: torch and BLAS threads of a process.
        environment: variables to set unless they are set already.
        memory_fraction: share of the GPU's memory that a process may allocate, or None.
        run: run id, for metrics.
        number: the actor's number in its pool.
    """

    worker: str
    threads: int
    environment: Mapping[str, str]
    memory_fraction: float | None = None
    run: str = ""
    number: int = 0


def forwarded_environment() -> dict[str, str]:
    """The `FORWARDED` variables that are set in this process."""
    return {name: os.environ[name] for name in FORWARDED if name in os.environ}


def adopt_environment(environment: Mapping[str, str], folder: str = "") -> None:
    """Takes over what a process on another node must have from whoever started it.

    Args:
        environment: variables to set unless they are set here.
        folder: working directory, used if it exists here.
    """
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    if os.path.isdir(folder):
        os.chdir(folder)


class ClientActor:
    """Wraps a worker class in an actor.

    The constructor does nothing that can fail, so that an import error or a bad stage reaches the pool as the
    exception it is and not as an actor that died.

    Args:
        setup: worker, threads and place in the pool.

    Attributes:
        ranks: given to the worker; set before a stage is opened where several processes hold its model together.
    """

    def __init__(self, setup: ActorSetup) -> None:
        self.ranks: Ranks | None = None
        self._setup, self._metrics = setup, ActorMetrics(setup.run, setup.number)
        self._worker: Any = None
        self._info: StageInfo | None = None
        adopt_environment(setup.environment)

    def load(self) -> None:
        """Makes the worker, which is mostly imports, while the driver prepares data.

        Nobody waits for the answer: what fails here fails again, and is heard, when a stage is opened.
        """
        self._worker = self._start()

    def open(self, spec: StageSpec) -> str:
        """Opens a stage and returns a fingerprint of its `StageInfo`, equal on every actor."""
        if self._worker is None:
            self._worker = self._start()
        self._info = self._worker.open(spec)
        return _fingerprint(self._info)

    def info(self) -> StageInfo | None:
        """The open stage's `StageInfo`; asked of one actor only, since it holds a whole flat state."""
        return self._info

    def run(self, jobs: Sequence[SegmentJob], shared: FloatArray | None) -> list[SegmentResult]:
        """Plays segments one after the other.

        Args:
            jobs: segments of one round, several in one call.
            shared: SHARED state (P,) float32, a read-only view of the object store, or None.
        """
        where = vars(here())
        results = [self._worker.run(job, shared) for job in jobs]
        for result in results:
            result.host = {**result.host, **where}
            result.costs = {client: replace(cost, actor=self._setup.number) for client, cost in result.costs.items()}
        if jobs:
            self._metrics.played(jobs[0].stage)
        return results

    @ray.method(concurrency_group="watch")
    def host(self) -> Host:
        """Pid and node; answers while `run` runs."""
        return here()

    @ray.method(concurrency_group="watch")
    def stack(self) -> str:
        """What every thread does now; answers while `run` hangs, unless that holds the interpreter's lock."""
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read().decode(errors="replace")

    def _start(self) -> Any:
        for name in THREAD_VARIABLES:
            os.environ[name] = str(self._setup.threads)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        with importing():
            worker = resolve(self._setup.worker)
            # A worker without torch (tests) must not pay seconds for importing it.
            if torch := sys.modules.get("torch"):
                self._limit(torch)
            return worker() if self.ranks is None else worker(self.ranks)

    def _limit(self, torch: Any) -> None:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        threadpool_limits(self._setup.threads)  # BLAS libraries that were loaded before the variables were set
        torch.set_num_threads(self._setup.threads)
        if self._setup.memory_fraction is not None and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(self._setup.memory_fraction)


def here() -> Host:
    """This process."""
    return Host(os.getpid(), ray.get_runtime_context().get_node_id(), socket.gethostname())


def _fingerprint(info: StageInfo) -> str:
    layout = repr((info.shared, info.private, info.modules, info.r_init))
    digest = hashlib.blake2b(layout.encode(), digest_size=16)
    digest.update(np.ascontiguousarray(info.initial).data)
    return digest.hexdigest()
