"""Rounds without training that move much: an echo for a worker, and a driver that counts its memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import psutil

from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult, StageInfo, StageSpec, metric_row
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.core.settings import EngineConfig
from fedtailor.federated.rounds import RoundOutcome, RoundPlan, run_rounds
from fedtailor.methods import build_method
from fedtailor.storage.commit_log import CommitLog
from fedtailor.storage.files import Storage
from fedtailor.storage.round_store import CommittedRounds

SIZE = 250_000
CLIENTS = tuple(f"seen/xx/{i:02d}" for i in range(16))


class EchoWorker:
    """Answers every client with what it was sent: one megabyte a round."""

    def open(self, spec: StageSpec) -> StageInfo:
        return StageInfo((ParamSpec("w", (SIZE,), Scope.SHARED),), (), np.zeros(SIZE, np.float32), (), 0)

    def run(self, job: SegmentJob, shared: FloatArray | None) -> SegmentResult:
        mean, rows = WeightedMean(), []
        state = mean.zero(SIZE)
        for client in job.clients:
            state = mean.add(state, np.asarray(shared, np.float32), 1.0)
            rows.append(metric_row(stage="base", round=job.round, client=client, metric="train_loss", weight=1.0))
        return SegmentResult(job.stage, job.round, job.index, job.attempt, state, rows, valid=job.clients)


def play(address: str, folder: Path, rounds: int) -> None:
    """Writes ``memory.json``: the driver's resident megabytes after every round."""
    from ray._private import ray_constants

    from actors.ray_pool import RayPool

    ray_constants.ENABLE_RAY_CLUSTER = False
    plan = RoundPlan("base/seed0", 0, rounds, CLIENTS, dict.fromkeys(CLIENTS, 1), len(CLIENTS), 8, 2)
    spec = StageSpec("base/seed0", "rounds", "fedavg", {}, 0, "", "", 1)
    config = EngineConfig(actors=2, address=address)
    pool = RayPool(config, lambda event: None, worker="null_rounds:EchoWorker")
    info = pool.open(spec)
    log = CommittedRounds(CommitLog(Storage(str(folder)), "artifacts/base-0"), info.shared, 1)
    memory: list[float] = []

    def measured(outcome: RoundOutcome) -> None:
        memory.append(psutil.Process().memory_info().rss / 2**20)

    method = build_method("fedavg", {}, 1)
    run_rounds(plan, method, pool, info.initial, log, lambda result: None, measured)
    (folder / "memory.json").write_text(json.dumps(memory))
    pool.close()
