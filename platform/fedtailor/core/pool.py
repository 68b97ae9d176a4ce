"""Where segments run. Two kinds exist: `SerialPool` here and ``actors.ray_pool.RayPool``; same bytes from both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult, StageSpec
from fedtailor.core.scope import ParamSpec

if TYPE_CHECKING:
    from fedtailor.core.settings import EngineConfig

OnResult = Callable[[SegmentResult], None]
Meanwhile = Callable[[], None]
OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class StageInfo:
    """What a worker learned by opening a stage; equal on every worker.

    Args:
        shared: SHARED parameters in flat order.
        private: PRIVATE parameters in flat order.
        initial: SHARED state before round 0, flat float32, (P,).
        modules: names of the L adapted linear layers.
        r_init: rank before pruning (0 where the method has none).
    """

    shared: tuple[ParamSpec, ...]
    private: tuple[ParamSpec, ...]
    initial: FloatArray
    modules: tuple[str, ...]
    r_init: int


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


class SerialPool:
    """Runs everything in this process; for debugging, notebooks and most tests."""

    def __init__(self, config: EngineConfig, on_event: OnEvent) -> None:
        from fedtailor.core.engine import Worker

        self._worker = Worker()
        self._on_event = on_event

    @property
    def size(self) -> int:
        """One."""
        return 1

    def open(self, spec: StageSpec) -> StageInfo:
        """See `Pool.open`."""
        return self._worker.open(spec)

    def run(
        self,
        jobs: Sequence[SegmentJob],
        shared: FloatArray | None,
        on_result: OnResult,
        meanwhile: Meanwhile = nothing,
    ) -> list[SegmentResult]:
        """See `Pool.run`."""
        meanwhile()
        results = []
        for job in jobs:
            result = self._worker.run(job, shared)
            on_result(result)
            results.append(result)
        return results

    def close(self) -> None:
        """Forgets the model."""
        self._worker.close()
