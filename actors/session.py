"""Which Ray cluster a run uses: the one that is there, one to join, or a local one of its own."""

from __future__ import annotations

import logging
import os
import shutil
import site
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]
import ray
from ray._private import ray_constants
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import actors
import fedtailor
from actors.client_actor import THREAD_VARIABLES
from actors.join import join, provide_token
from actors.placement import NodeResources
from fedtailor.core.outside import packages

PROBE_S = 30.0

_MIB = 2**20


@dataclass
class RaySession:
    """A connection to Ray, and whether this process started the cluster behind it."""

    started: bool

    def close(self) -> None:
        """Stops Ray if, and only if, this session started it; safe to call twice."""
        if self.started:
            self.started = False
            ray.shutdown()


def ensure_ray(address: str | None = None, threads: int = 1) -> RaySession:
    """Uses Ray if it is initialised, joins ``address`` or $RAY_ADDRESS if given, else starts a local cluster.

    A local cluster listens on the loopback interface only, has one CPU per processor, and hands its
    processes this process's environment, so no runtime environment has to be built.

    Args:
        address: ``auto``, ``host:port``, ``ray://host:port``, or ``local`` for a cluster of its own.
        threads: BLAS and OpenMP threads of a local cluster's processes.

    Raises:
        PlacementError: there is no cluster at the address, or it does not let this process in.
    """
    if ray.is_initialized():
        return RaySession(started=False)
    target = address or os.environ.get("RAY_ADDRESS")
    if target and target != "local":
        join(target)
        return RaySession(started=False)
    provide_token()
    with _environment(_local_variables(threads)), _loopback():
        ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_object_store_bytes(),
            _node_ip_address="127.0.0.1",
        )
    return RaySession(started=True)


def cluster_nodes(gpu_memory: bool = False) -> list[NodeResources]:
    """What the cluster has in total; inside a placement group (a Tune trial) what its bundles have.

    Args:
        gpu_memory: ask every node with GPUs for their size.
    """
    group = ray.util.get_current_placement_group()
    if group is not None:
        mine = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
        sizes = _gpu_memory(_alive()) if gpu_memory else {}
        smallest = min((size for size in sizes.values() if size is not None), default=None)
        return _bundles(group.bundle_specs, mine, smallest)
    nodes = _alive()
    sizes = _gpu_memory(nodes) if gpu_memory else {}
    return [
        NodeResources(
            node["NodeManagerHostname"],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            sizes.get(node["NodeID"]),
        )
        for node in nodes
    ]


def _bundles(
    specs: Sequence[Mapping[str, float]], mine: Mapping[str, float], gpu_memory_gb: float | None
) -> list[NodeResources]:
    """A group's bundles as nodes; what this process holds comes out of the first, where Tune puts a trial."""
    left = [dict(spec) for spec in specs]
    for name in ("CPU", "GPU"):
        left[0][name] = max(0.0, left[0].get(name, 0.0) - mine.get(name, 0.0))
    return [
        NodeResources(f"bundle {i}", spec.get("CPU", 0.0), spec.get("GPU", 0.0), gpu_memory_gb)
        for i, spec in enumerate(left)
    ]


def _alive() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def _gpu_memory(nodes: list[dict[str, Any]]) -> dict[str, float | None]:
    """Node id to the memory of its smallest GPU in 1e9 bytes; None where it does not answer in time."""
    probe = ray.remote(num_cpus=0, max_retries=0)(smallest_gpu_gb)
    refs = {
        node["NodeID"]: probe.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in nodes
        if node["Resources"].get("GPU", 0.0) > 0
    }
    done = set(ray.wait(list(refs.values()), num_returns=len(refs), timeout=PROBE_S)[0]) if refs else set()
    return {node: ray.get(ref) if ref in done else None for node, ref in refs.items()}


def smallest_gpu_gb() -> float | None:
    """Memory of this machine's smallest NVIDIA GPU in 1e9 bytes, None without the driver's tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=PROBE_S, check=False)
    sizes = [float(line) * _MIB / 1e9 for line in answer.stdout.split() if line.replace(".", "").isdigit()]
    return min(sizes, default=None)


def _object_store_bytes() -> int:
    """30 % of the free memory, at most 4 GiB and what the shared-memory file system has."""
    limits = [int(0.3 * psutil.virtual_memory().available), 4096 * _MIB]
    shared = Path("/dev/shm")
    if shared.is_dir():
        limits.append(int(0.9 * shutil.disk_usage(shared).free))
    return max(min(limits), 100 * _MIB)


def _local_variables(threads: int) -> dict[str, str]:
    roots = [str(Path(package.__path__[0]).resolve().parent) for package in (fedtailor, actors)]
    installed = set(site.getsitepackages())
    roots += [str(place.parent) for place in packages()]
    path = [root for root in dict.fromkeys(roots) if root not in installed] + os.environ.get("PYTHONPATH", "").split(
        os.pathsep
    )
    return {
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
    }


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables while the cluster's processes are started, then puts this process's own back."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _loopback() -> Iterator[None]:
    """Makes Ray keep 127.0.0.1; on Linux it would replace it by the address other machines see."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
