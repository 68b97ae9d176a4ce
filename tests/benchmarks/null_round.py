"""Cost of a round without training: sampling, broadcast, segments, sums, Parquet, commit."""

from __future__ import annotations

import tempfile
import time
from itertools import pairwise
from statistics import median, quantiles

from null_worker import NullWorker
from tiny import tiny

from fedtailor.core.pool import Pool
from fedtailor.core.rounds import RoundPlan, run_rounds
from fedtailor.methods import build_method
from fedtailor.runs.commit_log import CommitLog
from fedtailor.runs.round_log import CommittedRounds
from fedtailor.runs.storage import Storage

CLIENTS, ROUNDS, WARM = 100, 60, 10


class _Serial:
    size = 1

    def __init__(self) -> None:
        self._worker = NullWorker()

    def open(self, spec):  # type: ignore[no-untyped-def]
        return self._worker.open(spec)

    def run(self, jobs, shared, on_result):  # type: ignore[no-untyped-def]
        return [self._worker.run(job, shared) for job in jobs]

    def close(self) -> None:
        pass


def measure(pool: Pool, folder: str) -> list[float]:
    names = tuple(f"seen/xx/{i:04d}" for i in range(CLIENTS))
    plan = RoundPlan("base/seed0", 0, ROUNDS, names, dict.fromkeys(names, 1), CLIENTS, 8, 4)
    from fedtailor.core.messages import StageSpec

    spec = StageSpec("base/seed0", "rounds", "fedavg", {}, 0, "", "", "all-linear", 0.0, (), 1, 1, 1, 1, "float32")
    info = pool.open(spec)
    stamps = [time.perf_counter()]
    log = CommittedRounds(CommitLog(Storage(folder), "artifacts/base-0"), info.shared, 2)
    method = build_method("fedavg", {}, 1)
    run_rounds(plan, method, pool, info.initial, log, lambda r: None, lambda o: stamps.append(time.perf_counter()))
    return [1e3 * (b - a) for a, b in pairwise(stamps)][WARM:]


def null_rows() -> list[list[str]]:
    from pathlib import Path

    from actors.ray_pool import RayPool

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        exp = tiny(Path(folder), "engine.backend=ray", "engine.actors=2")
        pools = {
            "serial": lambda: _Serial(),
            "ray, 2 actors": lambda: RayPool(exp.engine, lambda e: None, worker="null_worker:NullWorker"),
        }
        for name, make in pools.items():
            pool = make()
            times = measure(pool, f"{folder}/{name.split(',')[0]}")
            pool.close()
            rows.append([name, f"{median(times):.1f}", f"{quantiles(times, n=10)[-1]:.1f}"])
    return rows
