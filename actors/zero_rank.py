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

import ray
import torch
import torch.distributed as dist
from torch import Tensor

from actors.client_actor import ActorSetup, ClientActor
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult


@dataclass(frozen=True)
class RankAnswer:
    """What a rank says after a call: hashes of its results, and on rank 0 the results themselves."""

    hashes: tuple[str, ...]
    results: list[SegmentResult] | None


class ZeroRank(ClientActor):
    """A client actor that is one of several; `actors.zero_group.ZeroGroup` calls all of them at once.

    Args:
        setup: worker, threads and the group's place in the pool.
        index: this rank's number, from 0.
        size: ranks of the group.
    """

    def __init__(self, setup: ActorSetup, index: int, size: int) -> None:
        super().__init__(setup)
        self._index, self._size = index, size
        self._listener: socket.socket | None = None

    def call_meeting(self) -> tuple[str, int]:
        """Rank 0: opens a free port on one address of this node, and on no other, where the others come to."""
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._listener = socket.create_server((host, 0))
        return host, self._listener.getsockname()[1]

    def join(self, host: str, port: int, deadline_s: float, device: str) -> None:
        """Joins the group; returns when all have.

        Args:
            host: address of rank 0's server.
            port: port of rank 0's server.
            deadline_s: seconds after which a collective without all ranks is an error.
            device: ``cuda`` for NCCL on this process's only GPU, else gloo.

        Raises:
            RuntimeError: not everybody came within the deadline.
        """
        if host.startswith("127."):
            # A group of one machine is not reachable from others.
            names = [name for _, name in socket.if_nameindex()]
            loopback = next((name for name in ("lo", "lo0") if name in names), names[0])
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        # DeepSpeed reads these; every process sees its own device only, which is number 0.
        os.environ.update(RANK=str(self._index), WORLD_SIZE=str(self._size), LOCAL_RANK="0")
        limit, descriptor = timedelta(seconds=deadline_s), None if self._listener is None else self._listener.detach()
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, self._size, self._index == 0, limit, master_listen_fd=descriptor, wait_for_workers=False
        )
        if device == "cuda":
            torch.cuda.set_device(0)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=self._index, world_size=self._size, timeout=limit)
        self.ranks = ProcessGroup(self._index, self._size)

    def play(self, jobs: Sequence[SegmentJob], shared: FloatArray | None) -> RankAnswer:
        """Plays segments, as all ranks do at the same time."""
        from fedtailor.worker.worker import content_hash

        results = self.run(jobs, shared)
        hashes = tuple(content_hash(result) for result in results)
        return RankAnswer(hashes, results if self._index == 0 else None)


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
