"""Which Ray cluster a run uses: the one that is there, one to join, or a local one of its own; and its token.

A cluster is joined in seconds, or refused in seconds with the reason. A local cluster gets a token of its own.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import site
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped,unused-ignore]
import psutil  # type: ignore[import-untyped,unused-ignore]
import ray
from ray._private import ray_constants
from ray._private.grpc_utils import init_grpc_channel
from ray.exceptions import AuthenticationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import actors
import fedtailor
from actors.placement import THREAD_VARIABLES, NodeResources
from fedtailor.core.errors import PlacementError, reported_as
from fedtailor.core.outside import packages

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
PACKAGES = ("fedtailor", "actors", "tune_spaces")
KNOCK_S, PROBE_S = 5.0, 30.0
CLIENT = "ray://"
_MIB = 2**20
_LONGEST_TMP = 39
"""Bytes: Linux takes 107 for a socket, and Ray adds up to 68 (session with date and process, ``plasma_store``)."""
_PORTS = "host:port is the head's port (6379), ray://host:port the client server's (10001)"


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
        PlacementError: nobody listens at the address, it is no Ray port, the token is missing or wrong, or a local
            cluster does not start.
    """
    if ray.is_initialized():
        return RaySession(started=False)
    target = address or os.environ.get("RAY_ADDRESS")
    if target and target != "local":
        _join(target)
        return RaySession(started=False)
    provide_token()
    folder = _short_folder()
    with _local_settings(threads):
        try:
            ray.init(
                address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False,
                logging_level=logging.ERROR, object_store_memory=_object_store_bytes(),
                _node_ip_address="127.0.0.1", _temp_dir=folder,
            )  # fmt: skip
        except Exception as error:  # Ray has no narrower one for processes that do not come up
            ray.shutdown()
            way_out = "a busy machine may give them no time: try again, or use engine.backend=serial"
            said = str(error).partition("\n")[0].rstrip(".")
            raise PlacementError(f"Ray's processes did not start ({said}); {way_out}") from error
    return RaySession(started=True)


def _short_folder() -> str | None:
    """Where Ray keeps its sockets if its own choice would be too long a name for one; None: it is not.

    Raises:
        PlacementError: /tmp cannot serve either.
    """
    own = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(own)) <= _LONGEST_TMP:
        return None
    if not os.access("/tmp", os.W_OK | os.X_OK):
        way_out = f"set RAY_TMPDIR to a folder of at most {_LONGEST_TMP} characters"
        raise PlacementError(f"{own} is too long a name for Ray's sockets, and /tmp cannot be written: {way_out}")
    return f"/tmp/ray-{os.getuid()}"


def provide_token() -> None:
    """Makes sure that there is a token before a local cluster is started, which wants one by default.

    Ray would write ``~/.ray/auth_token`` itself, but readable by everybody, and two processes that do so at once
    would have different tokens. Where the home folder cannot be written, the environment gets one for this process.

    Raises:
        PlacementError: $RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    if os.environ.get(MODE, "token").lower() != "token" or os.environ.get(TOKEN):
        return
    named = os.environ.get(TOKEN_PATH)
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if os.access(path, os.R_OK) and os.path.isfile(path) and os.path.getsize(path):
        return
    if named:
        raise PlacementError(
            f"{TOKEN_PATH} is set but file cannot be opened or is empty: {named}; name a file that holds a token, "
            f"or unset {TOKEN_PATH}, or set {MODE}=disabled"
        )
    token, temp = secrets.token_hex(32), path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with open(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(token)
                file.flush()
                os.fsync(file.fileno())
            os.link(temp, path)  # or fails, where another process was faster: its token is everybody's
        finally:
            temp.unlink(missing_ok=True)
    except OSError:
        if not os.path.isfile(path):
            os.environ[TOKEN] = token


def _join(address: str) -> None:
    """Connects this process to a cluster; fedtailor's code, and methods from outside, go along unless a Ray job has
    brought them."""
    if address.startswith(("http://", "https://")):
        raise PlacementError(
            f"engine.address={address} is a dashboard, which takes jobs: ray job submit --address {address} "
            f"-- python -m fedtailor run ... To join a cluster from here: {_PORTS}"
        )
    code: dict[str, Any] = {}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # as Ray sets it for a job, whose working directory is there
        specs = filter(None, map(find_spec, PACKAGES))
        folders = [Path(place).resolve() for spec in specs for place in spec.submodule_search_locations or ()]
        code = {"runtime_env": {"py_modules": [str(place) for place in (*folders, *packages())]}}
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **code)
    except AuthenticationError as error:
        message = str(error).partition(". ")[0].rstrip(".")  # without Ray's advice
        raise PlacementError(
            f"cannot join a Ray cluster at engine.address={address}: {message}; set {TOKEN_PATH}=FILE"
        ) from error
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise PlacementError(f"cannot join a Ray cluster at engine.address={address}: {error} ({_PORTS})") from error


def _knock(address: str) -> None:
    """Fails at once where nobody listens or the token is refused.

    Ray 2.60 itself tries for 20 s (a head) or 30 s (a client server) and then names neither as the reason. What comes
    back to an empty request does.
    """
    place = address.removeprefix(CLIENT)
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit():
        return  # auto and names that only Ray can resolve
    with reported_as(PlacementError, f"no Ray cluster listens at engine.address={address}", OSError):
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()
    call = "RayletDriver/KVExists" if address.startswith(CLIENT) else "NodeInfoGcsService/CheckAlive"
    channel = init_grpc_channel(place)
    try:
        channel.unary_unary(f"/ray.rpc.{call}")(b"", timeout=KNOCK_S)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise PlacementError(f"the Ray cluster at engine.address={address} {_refusal()}") from None
        if error.code() == grpc.StatusCode.UNAVAILABLE:
            raise PlacementError(
                f"what listens at engine.address={address} does not speak as Ray does here ({_PORTS}; RAY_USE_TLS must "
                "be as on the cluster)"
            ) from None
        # Any other answer to an empty request is Ray's; a busy head may also answer late.
    finally:
        channel.close()


def _refusal() -> str:
    """Why a cluster that asks for a token does not let this process in, and what to do."""
    way_out = f"{TOKEN_PATH}=FILE, a file that holds the cluster's token"
    if os.environ.get(MODE, "").lower() != "token":
        return f"wants a token, and this process shows none: set {MODE}=token and {way_out}"
    named = os.environ.get(TOKEN_PATH)
    source = f"{TOKEN_PATH}={named}" if named else str(Path.home() / ".ray" / "auth_token")
    return f"refuses the token that is found in {f'${TOKEN}' if os.environ.get(TOKEN) else source}: set {way_out}"


@contextmanager
def _local_settings(threads: int) -> Iterator[None]:
    """What the processes of a local cluster take over while they are started; afterwards all is as it was here."""
    installed = set(site.getsitepackages())
    roots = [Path(package.__path__[0]).resolve().parent for package in (fedtailor, actors)]
    roots += [place.parent for place in packages()]
    path = [root for root in dict.fromkeys(map(str, roots)) if root not in installed]
    variables = {
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        "PYTHONPATH": os.pathsep.join(filter(None, [*path, os.environ.get("PYTHONPATH")])),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
    }
    before = {name: os.environ.get(name) for name in variables}
    # On Linux Ray would replace 127.0.0.1 by the address that other machines see.
    clusters, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    os.environ.update(variables)
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _object_store_bytes() -> int:
    """30 % of the free memory, at most 4 GiB and what the shared-memory file system has."""
    limits = [int(0.3 * psutil.virtual_memory().available), 4096 * _MIB]
    shared = Path("/dev/shm")
    if shared.is_dir():
        limits.append(int(0.9 * shutil.disk_usage(shared).free))
    return max(min(limits), 100 * _MIB)


def cluster_nodes(gpu_memory: bool = False) -> list[NodeResources]:
    """What the cluster has in total; inside a placement group (a Tune trial) what its bundles have.

    Args:
        gpu_memory: ask every node with GPUs for their size.
    """
    nodes: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    sizes = _gpu_memory(nodes) if gpu_memory else {}
    group = ray.util.get_current_placement_group()
    if group is None:
        return [
            NodeResources(
                node["NodeManagerHostname"],
                node["Resources"].get("CPU", 0.0),
                node["Resources"].get("GPU", 0.0),
                sizes.get(node["NodeID"]),
            )
            for node in nodes
        ]
    smallest = min((size for size in sizes.values() if size is not None), default=None)
    bundles = [dict(spec) for spec in group.bundle_specs]
    # What this process holds comes out of the first bundle, where Tune puts a trial.
    mine = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
    for name in ("CPU", "GPU"):
        bundles[0][name] = max(0.0, bundles[0].get(name, 0.0) - mine.get(name, 0.0))
    return [
        NodeResources(f"bundle {i}", bundle.get("CPU", 0.0), bundle.get("GPU", 0.0), smallest)
        for i, bundle in enumerate(bundles)
    ]


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
