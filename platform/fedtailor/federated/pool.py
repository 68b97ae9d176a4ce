"""Where segments run. Two kinds exist: `SerialPool` here and ``actors.ray_pool.RayPool``; same bytes from both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult, StageInfo, StageSpec

OnResult = Callable[[SegmentResult], None]
Meanwhile = Callable[[], None]
OnEvent = Callable[[dict[str, Any]], None]


def nothing() -> None:
    """No work for the driver."""


class Pool(Protocol):
    """Runs segments of one open stage at a time."""

    @property
    def size(self) -> int:
        """Number of workers."""

    def open(self, spec: StageSpec) -> StageInfo:
        """Prepares all workers for a stage; closes the one before it."""

    def run(
        self,
        jobs: Sequence[SegmentJob],
        shared: FloatArray | None,
        on_result: OnResult,
        meanwhile: Meanwhile = nothing,
    ) -> list[SegmentResult]:
        """Runs jobs and returns one result each, in job order.

        Args:
            jobs: segments of one round or chunk.
            shared: SHARED state (P,) float32, or None where the method has none.
            on_result: called once per accepted result, as they come, for progress only.
            meanwhile: the driver's own work, called once, as soon as the workers have theirs.

        Raises:
            WorkerError: a job was lost more often than ``engine.retries``.
            TailorError: whatever the worker raised on purpose.
            Exception: whatever ``meanwhile`` raised.
        """

    def close(self) -> None:
        """Frees the workers. Never stops a cluster that the pool did not start."""
