"""The fake worker in a process that has torch, to see what the actor does to it."""

from __future__ import annotations

import os

import torch
from fake_worker import FakeWorker

from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult


class ThreadWorker(FakeWorker):
    """Reports the threads that it may use."""

    def run(self, job: SegmentJob, shared: FloatArray | None) -> SegmentResult:
        result = super().run(job, shared)
        result.host = {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}
        return result
