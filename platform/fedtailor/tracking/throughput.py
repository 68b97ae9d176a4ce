"""Throughput of a stage, and the small file that shows it to other processes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from fedtailor.storage.journal import utc_now
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tracking.events import name_of

EVERY_S = 2.0
"""Shortest time between two writings of ``progress.json``."""


@dataclass
class Throughput:
    """Speed of one stage, measured from when this process took it up.

    Args:
        unit: ``rounds`` or ``chunks``.
        started: monotonic seconds.
    """

    unit: str
    started: float
    clients: int = 0
    first: int | None = None
    done: int = 0
    total: int = 0
    retries: int = 0
    """Segments that were lost and went out again."""

    @classmethod
    def of(cls, event: Mapping[str, Any], now: float) -> Throughput:
        """The throughput of a stage from the event of its start."""
        return cls("chunks" if str(event["stage"]).startswith("personalise") else "rounds", now)

    def count(self, event: Mapping[str, Any]) -> bool:
        """Counts what an event adds; whether it was about progress."""
        name = name_of(event)
        if name == "segment":
            self.clients += int(event["clients"])
        elif name == "progress":
            self.advance(event["done"], event["total"])
        elif name == "pool/job_retried":
            self.retries += 1
        else:
            return False
        return True

    def advance(self, done: int, total: int) -> None:
        """Notes that ``done`` of ``total`` are committed; those before the first call were done earlier."""
        self.first = done - 1 if self.first is None else self.first
        self.done, self.total = done, total

    def elapsed(self, now: float) -> timedelta:
        """Time since the start, whole seconds."""
        return timedelta(seconds=round(now - self.started))

    def per_second(self, now: float) -> float:
        """Clients per second."""
        return self.clients / max(now - self.started, 1e-9)

    def seconds_left(self, now: float) -> float | None:
        """Expected seconds to the stage's end; None before the first commit."""
        own = self.done - (self.first or 0)
        if not own or self.first is None:
            return None
        return (self.total - self.done) * (now - self.started) / own

    def rate(self, now: float) -> str:
        """``12.3 clients/s``, and how many segments were retried if any was."""
        again = {0: "", 1: ", 1 retry"}.get(self.retries, f", {self.retries} retries")
        return f"{self.per_second(now):.1f} clients/s{again}"

    def eta(self, now: float) -> str:
        """``ETA 0:01:10``, or blank before the first commit."""
        return eta_text(self.seconds_left(now))


def eta_text(seconds: float | None) -> str:
    """``ETA 0:01:10``; without digits where unknown."""
    return "ETA -:--:--" if seconds is None else f"ETA {timedelta(seconds=round(seconds))}"


class ProgressFile:
    """Keeps ``progress.json`` in step with a run's events, at most every `EVERY_S` seconds.

    Args:
        run: its folder.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run, self._stage = run, ""
        self._throughput: Throughput | None = None
        self._written = float("-inf")

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Takes any event."""
        now = time.monotonic()
        if event["kind"] == "stage":
            self._stage, self._throughput = event["stage"], None
            if event["state"] == "running":
                self._throughput = Throughput.of(event, now)
                self._write(self._throughput, now)
        elif self._throughput is not None and self._throughput.count(event) and now - self._written >= EVERY_S:
            self._write(self._throughput, now)

    def _write(self, throughput: Throughput, now: float) -> None:
        self._written = now
        left = throughput.seconds_left(now)
        self._run.set_progress(
            {
                "stage": self._stage, "unit": throughput.unit, "done": throughput.done, "total": throughput.total,
                "clients": throughput.clients, "elapsed_s": round(now - throughput.started, 3),
                "clients_per_second": round(throughput.per_second(now), 3),
                "seconds_left": None if left is None else round(left, 1), "updated": utc_now(),
            }
        )  # fmt: skip
