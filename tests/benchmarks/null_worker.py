"""A worker that trains nothing: what is left is the platform's own cost."""

from __future__ import annotations

import numpy as np

from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult, StageInfo, StageSpec, metric_row
from fedtailor.core.scope import ParamSpec, Scope

SIZE = 10_000


class NullWorker:
    """Answers every client with what it was sent, and one metric."""

    def open(self, spec: StageSpec) -> StageInfo:
        self.spec = spec
        specs = (ParamSpec("w", (SIZE,), Scope.SHARED),)
        return StageInfo(specs, (), np.zeros(SIZE, np.float32), (), 0)

    def run(self, job: SegmentJob, shared: FloatArray | None) -> SegmentResult:
        mean = WeightedMean()
        state = mean.zero(SIZE)
        rows = []
        for client in job.clients:
            state = mean.add(state, np.asarray(shared, np.float32), 1.0)
            rows.append(metric_row(stage="base", round=job.round, client=client, metric="train_loss", weight=1.0))
        result = SegmentResult(job.stage, job.round, job.index, job.attempt, state, rows, valid=job.clients)
        result.seconds = dict.fromkeys(job.clients, 1e-6)
        return result

    def close(self) -> None:
        pass
