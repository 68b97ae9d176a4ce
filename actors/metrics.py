"""What a run shows on Ray's Prometheus endpoints, one per node, and on Ray's dashboard.

Ray puts ``ray_`` before every name and adds the process and its node. Each process sends its values every ten
seconds, so a value costs microseconds where it is noted; they are lost with the cluster, and nothing relies on them.
Counters and the histogram stay; of a gauge Ray 2.60 shows each value that was sent once, so it is absent while a long
round sets none (in Prometheus: ``last_over_time(ray_fedtailor_clients_per_second[15m])``).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol

from ray.util.metrics import Counter, Gauge, Histogram

from fedtailor.core.messages import SegmentResult
from fedtailor.worker.segment import peak_rss

PREFIX = "fedtailor_"

TAGS = ("run", "stage")

SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]
"""Upper ends of the classes of `fedtailor_round_seconds`."""


class Sink(Protocol):
    """Takes events."""

    def event(self, event: dict[str, Any]) -> None:
        """Takes one."""


class PoolMetrics:
    """Metrics of the process that drives a run: clients, segments, losses.

    ``fedtailor_clients_total``, ``fedtailor_rejected_clients_total`` (kind), ``fedtailor_clients_per_second``,
    ``fedtailor_round_seconds``, ``fedtailor_segments_waiting``, ``fedtailor_retries_total``,
    ``fedtailor_losses_total`` (kind), each with run and stage.

    Args:
        run: run id, ``""`` for none.
    """

    def __init__(self, run: str) -> None:
        self._tags = {"run": run, "stage": ""}
        self._clients = Counter(f"{PREFIX}clients_total", "Clients with a valid result.", TAGS)
        self._rejected = Counter(f"{PREFIX}rejected_clients_total", "Clients without one.", (*TAGS, "kind"))
        self._rate = Gauge(f"{PREFIX}clients_per_second", "Of the newest round or chunk.", TAGS)
        self._seconds = Histogram(
            f"{PREFIX}round_seconds", "From a round's first segment to its last, without its commit.", SECONDS, TAGS
        )
        self._waiting = Gauge(f"{PREFIX}segments_waiting", "Segments that no actor has yet.", TAGS)
        self._retries = Counter(f"{PREFIX}retries_total", "Segments that were lost and went out again.", TAGS)
        self._losses = Counter(f"{PREFIX}losses_total", "Actors lost.", (*TAGS, "kind"))

    def open(self, stage: str) -> None:
        """Everything from now on belongs to a stage."""
        self._tags = {**self._tags, "stage": stage}

    def waiting(self, segments: int) -> None:
        """How many segments no actor has yet."""
        self._waiting.set(segments, self._tags)

    def taken(self, result: SegmentResult) -> None:
        """A segment's result counts."""
        if result.valid:
            self._clients.inc(len(result.valid), self._tags)
        for failure in result.failures:
            self._rejected.inc(1, {**self._tags, "kind": failure.kind})

    def played(self, clients: int, seconds: float) -> None:
        """All segments of a round or chunk are there."""
        self._seconds.observe(max(seconds, 1e-9), self._tags)
        self._rate.set(clients / max(seconds, 1e-9), self._tags)

    def event(self, event: Mapping[str, Any]) -> None:
        """Counts what the pool tells of losses and recoveries."""
        if event["event"] == "actor_lost":
            self._losses.inc(1, {**self._tags, "kind": event["kind"]})
        elif event["event"] == "job_retried":
            self._retries.inc(1, self._tags)


class ActorMetrics:
    """Memory of a client actor: ``fedtailor_peak_rss_bytes`` and ``fedtailor_gpu_bytes``, with run, stage and actor.

    Args:
        run: run id.
        actor: number in its pool.
    """

    def __init__(self, run: str, actor: int) -> None:
        self._tags = {"run": run, "actor": str(actor)}
        tags = (*TAGS, "actor")
        self._rss = Gauge(f"{PREFIX}peak_rss_bytes", "Highest resident memory since the process started.", tags)
        self._gpu = Gauge(f"{PREFIX}gpu_bytes", "GPU memory that torch holds, its cache included.", tags)

    def played(self, stage: str) -> None:
        """Notes what the process holds after a call."""
        tags = {**self._tags, "stage": stage}
        self._rss.set(peak_rss(), tags)
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            self._gpu.set(torch.cuda.memory_reserved(), tags)


class CommitMetrics:
    """Hands events on and counts ``fedtailor_commits_total``, with run and stage.

    Args:
        sink: who gets them.
        run: run id.
    """

    def __init__(self, sink: Sink, run: str) -> None:
        self._sink, self._run = sink, run
        self._commits = Counter(f"{PREFIX}commits_total", "Rounds and chunks that were committed.", TAGS)

    def event(self, event: dict[str, Any]) -> None:
        """Takes one event."""
        self._sink.event(event)
        if event.get("kind") == "progress":
            self._commits.inc(1, {"run": self._run, "stage": event["stage"]})
