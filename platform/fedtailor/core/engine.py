"""The worker: runs segments of a stage, wherever it lives. `SerialPool` holds one; a Ray actor wraps another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedtailor.core.allocator import keep_freed_memory
from fedtailor.core.errors import TailorError
from fedtailor.core.faults import FaultPlan, planned
from fedtailor.core.group_answer import check_answer
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult, StageSpec
from fedtailor.core.pool import StageInfo
from fedtailor.core.ranks import Ranks
from fedtailor.core.sabotage import Sabotage
from fedtailor.core.segment import Segment
from fedtailor.core.worker_stage import OpenStage, on_this_node


class Worker:
    """Keeps one model resident and plays segment after segment through it.

    Args:
        ranks: the processes that hold the model together and all run the same segments; None: this one alone.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self._ranks = ranks
        if ranks is None:  # the weights that ranks gather come and go: theirs go back to the system
            keep_freed_memory()
        self._stage: OpenStage | None = None
        self._faults: FaultPlan | None = None

    def open(self, spec: StageSpec) -> StageInfo:
        """Opens a stage; the model stays if the one before used the same, unchanged."""
        spec, old = on_this_node(spec), self._stage
        keep = old and not old.trains_base and same_base(old.spec, spec)
        net = old.net if old and keep else None
        self._stage = None
        if net is not None:
            net.unbind()
        self._stage = OpenStage.open(spec, net, self._ranks)
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
            WorkerError: what ranks computed together is not what it should be; see `core.group_answer`.
        """
        stage = self._stage
        if stage is None or stage.spec.key != job.stage:
            raise TailorError(f"segment of stage {job.stage} sent to a worker of {stage.spec.key if stage else 'none'}")
        sabotage = Sabotage(self._faults, job) if self._faults else None
        result = Segment(stage, job, shared, sabotage).play()
        if self._ranks is not None:
            stage.net.verify()
            check_answer(result, stage.net)
        return result


def same_base(old: StageSpec, new: StageSpec) -> bool:
    """Whether a worker may keep the model that it has for another stage."""
    names = (
        "model_dir", "data_dir", "targets", "dtype", "base_dropout", "device", "attention", "weights", "checkpointing",
        "zero",
    )  # fmt: skip
    return all(getattr(old, name) == getattr(new, name) for name in names)


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
