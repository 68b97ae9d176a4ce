"""The real worker in a process that knows ``bucket://`` and logs what it reads from there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import bucket_store

from fedtailor.core.messages import StageInfo, StageSpec
from fedtailor.worker.worker import Worker


class BucketWorker(Worker):
    """Logs beside the bucket."""

    def open(self, spec: StageSpec) -> StageInfo:
        os.environ["BUCKET_LOG"] = f"{bucket_store.BucketFileSystem._strip_protocol(spec.storage)}.log"
        return super().open(spec)
