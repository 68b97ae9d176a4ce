"""The worker: runs segments of a stage, wherever it lives. `SerialPool` holds one; a Ray actor wraps another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedtailor.core.errors import TailorError
from fedtailor.core.faults import FaultPlan, planned
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult, StageSpec
from fedtailor.core.pool import StageInfo
from fedtailor.core.sabotage import Sabotage
from fedtailor.core.segment import Segment
from fedtailor.core.worker_stage import OpenStage, on_this_node


class Worker:
    """Keeps one model resident and plays segment after segment through it."""

    def __init__(self) -> None:
        self._stage: OpenStage | None = None
        self._faults: FaultPlan | None = None

    def open(self, spec: StageSpec) -> StageInfo:
        """Opens a stage; the model stays if the one before used the same, unchanged."""
        spec, old = on_this_node(spec), self._stage
        same = ("model_dir", "data_dir", "targets", "dtype", "base_dropout", "device", "attention")
        keep = old and not old.trains_base and all(getattr(old.spec, f) == getattr(spec, f) for f in same)
        net = old.net if old and keep else None
        self._stage = None
        if net is not None:
            net.unbind()
        self._stage = OpenStage.open(spec, net)
        self._faults = planned()
        return self._stage.info()

    def close(self) -> None:
        """Forgets the model."""
        self._stage = None

    def run(self, job: SegmentJob, shared: FloatArray | None) -> SegmentResult:
        """Plays one segment.

        Args:
            job: clients and round.
            shared: SHARED state (P,) float32; only read, may be a read-only buffer.

        Returns:
            One sum over the valid clients, and rows, private state and failures of each.

        Raises:
            TailorError: nothing in the segment can run (wrong stage, method without a round).
        """
        stage = self._stage
        if stage is None or stage.spec.key != job.stage:
            raise TailorError(f"segment of stage {job.stage} sent to a worker of {stage.spec.key if stage else 'none'}")
        sabotage = Sabotage(self._faults, job) if self._faults else None
        return Segment(stage, job, shared, sabotage).play()


def merge_results(parts: Sequence[SegmentResult]) -> SegmentResult:
    """One result from those of a segment's single clients, in client order."""
    whole = replace(parts[0])
    for part in parts[1:]:
        if whole.partial is None:
            whole.partial = part.partial
        elif part.partial is not None:
            joined = isinstance(whole.partial, list)
            whole.partial = whole.partial + part.partial if joined else whole.partial.merged(part.partial)
        whole.metrics = whole.metrics + part.metrics
        whole.private = whole.private | part.private
        whole.tensors = whole.tensors | part.tensors
        whole.adapters = whole.adapters | part.adapters
        whole.failures = whole.failures + part.failures
        whole.warnings = whole.warnings + part.warnings
        whole.valid = whole.valid + part.valid
        whole.norms = whole.norms | part.norms
        whole.seconds = whole.seconds | part.seconds
        whole.costs = whole.costs | part.costs
    return whole
