"""The platform: ``run_ours.py JOB OUT key=value ...`` with the engine's keys. Commits and metrics included."""

from __future__ import annotations

import json
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from regimes import Regime

from fedtailor.core.config import importing
from fedtailor.core.settings import EngineConfig

if TYPE_CHECKING:
    from fedtailor.federated.pool import Pool
    from fedtailor.federated.rounds import RoundOutcome


def open_pool(engine: EngineConfig, events: list[dict[str, Any]]) -> Pool:
    if engine.backend == "serial":
        from bench_worker import StampedWorker

        from fedtailor.worker.worker import SerialPool

        pool = SerialPool(engine, events.append)
        pool._worker = StampedWorker()
        return pool
    from actors.ray_pool import RayPool

    return RayPool(engine, events.append, worker="bench_worker:StampedWorker")


def run(folder: Path, engine: EngineConfig) -> dict[str, Any]:
    known = json.loads((folder / "regime.json").read_text())
    regime = Regime(**{**known, "sizes": tuple(known["sizes"])})
    events: list[dict[str, Any]] = []
    outcomes: list[RoundOutcome] = []
    with importing():
        pool = open_pool(engine, events)  # as a run's driver does: its actors come up while all this is imported
        from job import round_plan, stage_spec

        from fedtailor.federated.rounds import run_rounds
        from fedtailor.methods import build_method
        from fedtailor.storage.commit_log import CommitLog
        from fedtailor.storage.files import Storage
        from fedtailor.storage.round_store import CommittedRounds

    with TemporaryDirectory() as storage:
        spec = stage_spec(regime, folder, engine)
        info = pool.open(spec)
        log = CommittedRounds(CommitLog(Storage(storage), "artifacts/base-0"), info.shared, engine.keep_rounds)
        stamps = [time.perf_counter()]

        def closed(outcome: RoundOutcome) -> None:
            stamps.append(time.perf_counter())
            outcomes[:] = [outcome]

        method = build_method(spec.method, spec.method_config, spec.r_max)
        state = run_rounds(
            round_plan(regime, folder, engine), method, pool, info.initial, log, lambda result: None, closed
        )
    pool.close()
    losses = [row["value"] for row in outcomes[0].metrics if row["metric"] == "train_loss"]
    lost = [event for event in events if event.get("event") == "actor_lost"]
    return {
        "round_s": [b - a for a, b in pairwise(stamps)], "loss": float(np.mean(losses)), "final": state.shared,
        "lost": len(lost),
    }  # fmt: skip


def main() -> None:
    folder, out, *words = sys.argv[1:]
    engine = EngineConfig(**{k: yaml.safe_load(v) for k, _, v in (word.partition("=") for word in words)})
    found = run(Path(folder), engine)
    from plain_model import report  # imports torch, which the pool need not wait for

    driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report(out, found["round_s"], found["final"], found["loss"], lost=found["lost"], driver_mb=driver)


if __name__ == "__main__":
    main()
