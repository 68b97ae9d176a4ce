"""What a client's call cost: data, bytes and memory. Shown and kept beside the results, never in a digest."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence

import torch

from fedtailor.core.messages import ClientCost, FloatArray, SegmentJob
from fedtailor.worker.open_stage import OpenStage

_UNIT = 1 if sys.platform == "darwin" else 1024


_FLOAT = 4


def peak_rss() -> int:
    """Highest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


def start_gpu_peak(device: torch.device) -> None:
    """Forgets the peak of what ran before; nothing on CPUs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def costs_of(
    stage: OpenStage,
    job: SegmentJob,
    clients: Sequence[str],
    tokens: Mapping[str, int],
    received: int,
    sent: Mapping[str, FloatArray],
    kept: Mapping[str, FloatArray],
) -> dict[str, ClientCost]:
    """Costs of a group that has just been played; they share its memory peaks.

    Args:
        stage: the open stage.
        job: its segment.
        clients: of the group.
        tokens: client to the tokens of its training examples; one whose data could not be read has none.
        received: numbers of the SHARED row that went out, 0 without one.
        sent: client to the SHARED row that came back; a failed client has none.
        kept: client to its PRIVATE row.
    """
    device = stage.net.device
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    rss, pid, host = peak_rss(), os.getpid(), platform.node()
    found = {}
    for client in clients:
        up = sent[client].size if client in sent else 0
        own = sum(rows[client].size for rows in (kept, job.overlay) if client in rows)
        found[client] = ClientCost(
            examples=stage.data.client(client).n_train, tokens=tokens.get(client, 0), bytes_down=_FLOAT * received,
            bytes_up=_FLOAT * up, bytes_kept=_FLOAT * own, peak_rss=rss, peak_gpu=gpu, attempt=job.attempt,
            host=host, pid=pid,
        )  # fmt: skip
    return found
