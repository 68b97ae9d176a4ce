"""What a run shows on Ray's Prometheus endpoints, one per node, and on Ray's dashboard.

Ray puts ``ray_`` before every name and adds the process and its node. Each process sends its values every ten
seconds, so a value costs microseconds where it is noted; they are lost with the cluster, and nothing relies on them.
Counters and the histogram stay; of a gauge Ray 2.60 shows each value that was sent once, so it is absent while a long
round sets none (in Prometheus: ``last_over_time(ray_fedtailor_clients_per_second[15m])``).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from fedtailor.core.messages import SegmentResult, peak_rss
from fedtailor.federated.pool import OnEvent

TAGS = ("run", "stage")
SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]
"""Upper ends of the classes of ``fedtailor_round_seconds``."""


class PoolMetrics:
    """Metrics of the process that drives a run: clients, segments, losses, each with run and stage.

    Args:
        run: run id, ``""`` for none.
    """

    def __init__(self, run: str) -> None:
        self._tags, by_kind = {"run": run, "stage": ""}, (*TAGS, "kind")
        self._clients = Counter("fedtailor_clients_total", "Clients with a valid result.", TAGS)
        self._rejected = Counter("fedtailor_rejected_clients_total", "Clients without one.", by_kind)
        self._rate = Gauge("fedtailor_clients_per_second", "Of the newest round or chunk.", TAGS)
        text = "From a round's first segment to its last, without its commit."
        self._seconds = Histogram("fedtailor_round_seconds", text, SECONDS, TAGS)
        self._waiting = Gauge("fedtailor_segments_waiting", "Segments that no actor has yet.", TAGS)
        self._retries = Counter("fedtailor_retries_total", "Segments that were lost and went out again.", TAGS)
        self._losses = Counter("fedtailor_losses_total", "Actors lost.", by_kind)

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
    """Memory of a client actor, with run, stage and actor.

    Args:
        run: run id.
        actor: number in its pool.
    """

    def __init__(self, run: str, actor: int) -> None:
        self._tags, tags = {"run": run, "actor": str(actor)}, (*TAGS, "actor")
        self._rss = Gauge("fedtailor_peak_rss_bytes", "Highest resident memory since the process started.", tags)
        self._gpu = Gauge("fedtailor_gpu_bytes", "GPU memory that torch holds, its cache included.", tags)

    def played(self, stage: str) -> None:
        """Notes what the process holds after a call."""
        tags = {**self._tags, "stage": stage}
        self._rss.set(peak_rss(), tags)
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            self._gpu.set(torch.cuda.memory_reserved(), tags)


def counting_commits(on_event: OnEvent, run: str) -> OnEvent:
    """Hands events on and counts ``fedtailor_commits_total``, with run and stage.

    Args:
        on_event: who gets them.
        run: run id.
    """
    commits = Counter("fedtailor_commits_total", "Rounds and chunks that were committed.", TAGS)

    def take(event: dict[str, Any]) -> None:
        on_event(event)
        if event.get("kind") == "progress":
            commits.inc(1, {"run": run, "stage": event["stage"]})

    return take
