"""One process of a group that holds a model together, and how the group finds and sums itself.

`ZeroRank` is the actor; `ProcessGroup` its place in torch.distributed's default group: NCCL between GPUs, gloo between
CPUs. `actors.zero_group.ZeroGroup` leads them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import Tensor

from actors.client_actor import ActorSetup, ClientActor, Host, here, stacks
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult, StageInfo, StageSpec


@dataclass(frozen=True)
class RankAnswer:
    """What a rank says after a call: hashes of its results, and on rank 0 the results themselves."""

    hashes: tuple[str, ...]
    results: list[SegmentResult] | None


class ZeroRank:
    """A client actor that is one of several; `actors.zero_group.ZeroGroup` calls all of them at once.

    Args:
        setup: worker, threads and the group's place in the pool.
        index: this rank's number, from 0.
        size: ranks of the group.
    """

    def __init__(self, setup: ActorSetup, index: int, size: int) -> None:
        self._index, self._size = index, size
        self._actor = ClientActor(setup)
        self._listener: socket.socket | None = None

    def call_meeting(self) -> Any:
        """Rank 0: opens the port where the others come to; returns a `Meeting`."""
        meeting, self._listener = call_meeting(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        return meeting

    def join(self, meeting: Any, deadline_s: float, device: str) -> None:
        """Joins the group; returns when all have."""
        self._actor.ranks = join(meeting, self._index, self._size, deadline_s, device, self._listener)

    def open(self, spec: StageSpec) -> str:
        """See `ClientActor.open`."""
        return self._actor.open(spec)

    def info(self) -> StageInfo | None:
        """See `ClientActor.info`."""
        return self._actor.info()

    def run(self, jobs: Sequence[SegmentJob], shared: FloatArray | None) -> RankAnswer:
        """Plays segments, as all ranks do at the same time."""
        from fedtailor.worker.worker import content_hash

        results = self._actor.run(jobs, shared)
        hashes = tuple(content_hash(result) for result in results)
        return RankAnswer(hashes, results if self._index == 0 else None)

    @ray.method(concurrency_group="watch")
    def host(self) -> Host:
        """Pid and node; answers while `run` runs."""
        return here()

    @ray.method(concurrency_group="watch")
    def stack(self) -> str:
        """What every thread does now."""
        return stacks()


@dataclass(frozen=True)
class ProcessGroup:
    """This process's place in the default group; see `core.scope.Ranks`."""

    index: int
    size: int

    def sum_(self, tensor: Tensor) -> None:
        """Replaces ``tensor`` by its sum over the group, in place; the same bytes everywhere.

        Raises:
            RuntimeError: somebody is gone, or did not come within the group's deadline.
        """
        if tensor.is_contiguous():
            dist.all_reduce(tensor)
        else:
            whole = tensor.contiguous()
            dist.all_reduce(whole)
            tensor.copy_(whole)


@dataclass(frozen=True)
class Meeting:
    """Where the processes of a group find each other: a server that rank 0 runs.

    Args:
        host: address of rank 0.
        port: port of its server.
    """

    host: str
    port: int


def call_meeting(host: str) -> tuple[Meeting, socket.socket]:
    """Opens a free port on one address, and on no other, for `join` on rank 0."""
    listener = socket.create_server((host, 0))
    return Meeting(host, listener.getsockname()[1]), listener


def join(
    meeting: Meeting, index: int, size: int, deadline_s: float, device: str, listener: socket.socket | None = None
) -> ProcessGroup:
    """Joins the group; returns when all are there.

    Args:
        meeting: address of rank 0's server.
        index: rank of this process; 0 needs the ``listener`` of `call_meeting`.
        size: ranks.
        deadline_s: seconds after which a collective without all ranks is an error.
        device: ``cuda`` for NCCL on this process's only GPU, else gloo.

    Raises:
        RuntimeError: not everybody came within the deadline.
    """
    limit = timedelta(seconds=deadline_s)
    if meeting.host.startswith("127."):
        # A group of one machine is not reachable from others.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    # DeepSpeed reads these; every process sees its own device only, which is number 0.
    os.environ.update(RANK=str(index), WORLD_SIZE=str(size), LOCAL_RANK="0")
    descriptor = None if listener is None else listener.detach()
    store = dist.TCPStore(  # type: ignore[attr-defined]
        meeting.host, meeting.port, size, index == 0, limit, master_listen_fd=descriptor, wait_for_workers=False
    )
    if device == "cuda":
        torch.cuda.set_device(0)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=index, world_size=size, timeout=limit)
    return ProcessGroup(index, size)


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), names[0])
