"""Ray clusters to break: on the loopback interface, each in a temporary folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray._private import ray_constants
from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[2]
PATHS = [str(p) for p in (ROOT / "platform", ROOT, ROOT / "tests", ROOT / "tests/chaos", ROOT / "tests/ray")]
sys.path += [path for path in PATHS if path not in sys.path]
QUICK: dict[str, Any] = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
"""A node that is gone is noticed after about two seconds instead of half a minute."""
_VARIABLES = {
    "PYTHONPATH": os.pathsep.join(PATHS),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
}


class Nodes:
    """A cluster whose nodes can be lost one by one.

    Args:
        cpus: CPUs of the head, then of each further node.
        system: Ray's internal settings.
        memory: object store of each node in bytes.
        gpus: GPUs that the head pretends to have.
    """

    def __init__(
        self, *cpus: float, system: dict[str, Any] | None = None, memory: int = 150 * 2**20, gpus: int = 0
    ) -> None:
        head, *others = cpus
        common = {"object_store_memory": memory, "node_ip_address": "127.0.0.1", "include_log_monitor": False}
        with _surroundings() as folder:
            self._cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    **common, "num_cpus": head, "num_gpus": gpus, "include_dashboard": False, "temp_dir": folder,
                    "_system_config": QUICK | (system or {}),
                },
            )  # fmt: skip
        self._node_args = {**common, "temp_dir": folder}
        self._others: list[Any] = []
        for number in others:
            self.add(number)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @property
    def folder(self) -> str:
        """Where its processes keep sockets and logs."""
        return str(self._node_args["temp_dir"])

    @property
    def others(self) -> list[str]:
        """Ids of the nodes beside the head."""
        return [str(node.node_id) for node in self._others]

    def add(self, cpus: float) -> None:
        """One more node."""
        with _surroundings(self._node_args["temp_dir"]):
            self._others.append(self._cluster.add_node(**self._node_args, num_cpus=cpus))

    def lose(self, number: int = 0) -> str:
        """Kills all processes of a node but the head; returns its id."""
        node = self._others.pop(number)
        self._cluster.remove_node(node, allow_graceful=False)
        return str(node.node_id)

    def lose_control_store(self) -> int:
        """Kills the head's GCS; returns its pid."""
        (info,) = self._cluster.head_node.all_processes["gcs_server"]
        os.kill(info.process.pid, signal.SIGKILL)
        info.process.wait()
        return int(info.process.pid)

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def nodes(*cpus: float, **options: Any) -> Iterator[Nodes]:
    """A cluster for the time of a with block; whatever it started is gone afterwards."""
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    made = Nodes(*cpus, **options)
    try:
        yield made
    finally:
        mine = [p for p in psutil.Process().children(recursive=True) if p.pid not in before and "ray" in _command(p)]
        made.close()
        for process in psutil.wait_procs(mine, timeout=5)[1]:
            process.kill()
        shutil.rmtree(made.folder, ignore_errors=True)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def _surroundings(folder: str | None = None) -> Iterator[str]:
    """Environment of the processes that are started; this process keeps its own."""
    if folder is None:
        folder = tempfile.mkdtemp(prefix="ft-", dir="/tmp")  # Ray's sockets need a short path.
        os.mkdir(f"{folder}/ray")
    variables = {**_VARIABLES, "RAY_TMPDIR": folder}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    enabled, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield folder
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
