"""The jobs of one round: which to hand out next, how often each was tried, and each result exactly once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from actors.ray_errors import ActorLoss
from fedtailor.core.errors import WorkerError, listed
from fedtailor.core.messages import SegmentJob, SegmentResult

BATCH_S = 0.02
"""Jobs share a call until they are expected to take this long: calls cost about a millisecond."""


class CostModel:
    """Seconds per client as measured, corrected by every result; decides the order of work, no number."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._total = 0.0

    def learn(self, seconds: Mapping[str, float]) -> None:
        """Moves each client's estimate half-way to what was measured."""
        for client, value in seconds.items():
            old = self._seconds.get(client)
            new = value if old is None else (old + value) / 2
            self._seconds[client] = new
            self._total += new - (old or 0.0)

    def estimate(self, clients: Iterable[str]) -> float:
        """Seconds that these clients take together; infinite while nothing was measured yet.

        >>> costs = CostModel()
        >>> costs.learn({"a": 2.0, "b": 4.0})
        >>> costs.estimate(["a", "new"])
        5.0
        """
        names = list(clients)
        if not self._seconds:
            return math.inf if names else 0.0
        mean = self._total / len(self._seconds)
        return sum(self._seconds.get(name, mean) for name in names)


class JobQueue:
    """Positions 0..n-1 of a job list on their way from to-do over lost and retried to done.

    Args:
        jobs: the list; results come back in its order.
        costs: estimates that decide the order of work.
        retries: how often a job may be lost and given out again.
    """

    def __init__(self, jobs: Sequence[SegmentJob], costs: CostModel, retries: int) -> None:
        self._jobs = list(jobs)
        self._costs = costs
        self._retries = retries
        self._losses: list[list[ActorLoss]] = [[] for _ in self._jobs]
        self._results: list[SegmentResult | None] = [None] * len(self._jobs)
        self._open = len(self._jobs)
        # Largest first; an unknown cost counts as its number of clients, ties go by position.
        self._todo = sorted(range(len(self._jobs)), key=lambda i: (-self._size(i), i))

    @property
    def finished(self) -> bool:
        """Whether every job has its result."""
        return self._open == 0

    @property
    def waiting(self) -> int:
        """Jobs that wait to be handed out."""
        return len(self._todo)

    def job(self, position: int) -> SegmentJob:
        """The job with the number of its current attempt."""
        return replace(self._jobs[position], attempt=self._jobs[position].attempt + len(self._losses[position]))

    def take(self, actors: int, single: bool = False) -> list[int]:
        """Hands out the next call's jobs: one, or as many as are expected to be short.

        Args:
            actors: pool size; no call takes more than its share of what is left.
            single: always one.
        """
        batch = [self._todo.pop(0)]
        share = math.ceil((len(self._todo) + 1) / max(1, actors))
        seconds = self._seconds(batch[0])
        # A job that was lost travels alone, so that it cannot take others with it.
        while not single and len(batch) < share and self._todo and not self._losses[batch[0]]:
            seconds += self._seconds(self._todo[0])
            if seconds > BATCH_S or self._losses[self._todo[0]]:
                break
            batch.append(self._todo.pop(0))
        return batch

    def accept(self, position: int, result: SegmentResult) -> bool:
        """Takes a result once; False for a second one or one of an attempt that was given up.

        Raises:
            WorkerError: the result answers another job.
        """
        job = self.job(position)
        if (result.stage, result.round, result.index) != (job.stage, job.round, job.index):
            raise WorkerError(
                f"an actor answered segment {result.index} of {result.stage}, round {result.round}, "
                f"when asked for segment {job.index} of {job.stage}, round {job.round}"
            )
        if self._results[position] is not None or result.attempt != job.attempt:
            return False
        self._results[position] = result
        self._open -= 1
        self._costs.learn(result.seconds)
        return True

    def lose(self, positions: Sequence[int], loss: ActorLoss) -> None:
        """Puts lost jobs back, first in line.

        Raises:
            WorkerError: one was lost more often than allowed; names it, its clients and every cause.
        """
        for position in positions:
            self._losses[position].append(loss)
        spent = [position for position in positions if len(self._losses[position]) > self._retries]
        if spent:
            raise WorkerError("\n".join(self._failure_report(position) for position in spent))
        self._todo[:0] = positions

    def results(self) -> list[SegmentResult]:
        """All results in job order; call when `finished`."""
        return [result for result in self._results if result is not None]

    def _seconds(self, position: int) -> float:
        return self._costs.estimate(self._jobs[position].clients)

    def _size(self, position: int) -> float:
        seconds = self._seconds(position)
        return seconds if math.isfinite(seconds) else float(len(self._jobs[position].clients))

    def _failure_report(self, position: int) -> str:
        job, losses = self._jobs[position], self._losses[position]
        causes = "; ".join(f"try {i + 1}: {loss.kind}: {loss.cause}" for i, loss in enumerate(losses))
        return (
            f"segment {job.index} of {job.stage}, round {job.round} (clients {listed(job.clients)}) was lost "
            f"{len(losses)} times, engine.retries={self._retries}: {causes}"
        )
