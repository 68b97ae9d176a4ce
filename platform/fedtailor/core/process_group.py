"""A group of processes over torch.distributed: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ProcessGroup:
    """This process's place in the default group; see `core.ranks.Ranks`."""

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
        port: of its server.
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
        meeting: where.
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
