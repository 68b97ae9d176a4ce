"""A fake worker that rejects the first client of segment 0 and says what the others cost."""

from __future__ import annotations

from dataclasses import replace

from fake_worker import FakeWorker

from fedtailor.core.messages import ClientCost, Failure, FloatArray, SegmentJob, SegmentResult

COST = ClientCost(
    examples=3, tokens=30, bytes_down=16, bytes_up=16, bytes_kept=0, peak_rss=1, peak_gpu=0, attempt=0, host="h", pid=1
)  # fmt: skip


class CostlyWorker(FakeWorker):
    """See the module."""

    def run(self, job: SegmentJob, shared: FloatArray | None) -> SegmentResult:
        result = super().run(job, shared)
        if job.index == 0:
            result.failures = [Failure(job.clients[0], job.stage, job.round, "rejected", "NaN")]
            result.valid = job.clients[1:]
        result.costs = {client: replace(COST, attempt=job.attempt) for client in job.clients}
        return result
