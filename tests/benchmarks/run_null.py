"""Null rounds of the platform: ``run_null.py OUT serial|ray:ACTORS CLIENTS``."""

from __future__ import annotations

import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from job import stage_spec
from null_worker import NullWorker
from plain_model import report
from regimes import REGIMES

from fedtailor.core.settings import EngineConfig
from fedtailor.federated.pool import Pool
from fedtailor.federated.rounds import RoundPlan, run_rounds
from fedtailor.methods import build_method
from fedtailor.storage.commit_log import CommitLog
from fedtailor.storage.files import Storage
from fedtailor.storage.round_store import CommittedRounds
from fedtailor.worker.worker import SerialPool

ROUNDS = {10: 60, 100: 60, 1000: 20}


def open_pool(backend: str) -> Pool:
    if backend == "serial":
        pool = SerialPool(EngineConfig(backend="serial"), lambda event: None)
        pool._worker = NullWorker()  # type: ignore[assignment]
        return pool
    from actors.ray_pool import RayPool

    engine = EngineConfig(actors=int(backend.partition(":")[2]))
    return RayPool(engine, lambda event: None, worker="null_worker:NullWorker")


def main() -> None:
    out, backend, clients = sys.argv[1], sys.argv[2], int(sys.argv[3])
    names = tuple(f"seen/xx/{i:05d}" for i in range(clients))
    spec = stage_spec(REGIMES[0], Path(), EngineConfig())
    plan = RoundPlan(spec.key, 0, ROUNDS[clients], names, dict.fromkeys(names, 1), clients, 8, 4)
    pool = open_pool(backend)
    info = pool.open(spec)
    stamps = [time.perf_counter()]
    with tempfile.TemporaryDirectory() as folder:
        log = CommittedRounds(CommitLog(Storage(folder), "artifacts/base-0"), info.shared, 2)
        run_rounds(
            plan, build_method("fedavg", {}, 1), pool, info.initial, log, lambda result: None,
            lambda outcome: stamps.append(time.perf_counter()),
        )  # fmt: skip
    pool.close()
    report(out, [b - a for a, b in pairwise(stamps)], np.zeros(1), 0.0)


if __name__ == "__main__":
    main()
