"""Segments as single-client jobs and back, for the mode with one actor per client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fedtailor.core.messages import SegmentJob, SegmentResult
from fedtailor.core.pool import OnResult


def single_clients(job: SegmentJob) -> list[SegmentJob]:
    """One job per client, in client order, each with its own private state only."""
    if len(job.clients) <= 1:
        return [job]
    return [
        replace(job, clients=(name,), private={k: row for k, row in job.private.items() if k == name})
        for name in job.clients
    ]


class Parts:
    """Joins a segment's results when the last one is there, in client order whatever came first.

    Args:
        jobs: the segments.
        merge: joins the results of one segment.
        on_result: called once per joined segment.
    """

    def __init__(
        self,
        jobs: Sequence[SegmentJob],
        merge: Callable[[Sequence[SegmentResult]], SegmentResult],
        on_result: OnResult,
    ) -> None:
        self._merge, self._on_result = merge, on_result
        pieces = [single_clients(job) for job in jobs]
        self.units: list[SegmentJob] = [unit for piece in pieces for unit in piece]
        """All single-client jobs, segment by segment."""
        self._segment = [i for i, piece in enumerate(pieces) for _ in piece]
        self._found: list[dict[int, SegmentResult]] = [{} for _ in pieces]
        self._sizes = [len(piece) for piece in pieces]
        self._merged: list[SegmentResult | None] = [None] * len(pieces)

    def add(self, position: int, result: SegmentResult) -> None:
        """Takes the result of ``units[position]``."""
        segment = self._segment[position]
        found = self._found[segment]
        found[position] = result
        if len(found) == self._sizes[segment]:
            merged = self._merge([found[i] for i in sorted(found)])
            self._merged[segment] = merged
            found.clear()
            self._on_result(merged)

    def results(self) -> list[SegmentResult]:
        """The joined results in job order."""
        return [result for result in self._merged if result is not None]
