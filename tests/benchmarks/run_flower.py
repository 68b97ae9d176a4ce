"""Flower's simulation: ``run_flower.py JOB OUT ACTORS``; trains nothing with JOB = null:CLIENTS.

Fair settings: as many supernodes as a round has clients, all of them sampled; the arrays are one flat vector; an
actor keeps its model; no evaluation; one thread per actor.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np
import torch
from flower_client import app
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from plain_model import Job, report

NULL_ROUNDS = {10: 12, 100: 8}


def main() -> None:
    what, out, actors = sys.argv[1:4]
    os.environ["BENCH_JOB"] = what
    if what.startswith("null:"):
        clients = int(what.partition(":")[2])
        rounds, initial = NULL_ROUNDS.get(clients, 5), np.zeros(10_000, np.float32)
    else:
        job = Job.open(what)
        clients, rounds, initial = job.regime["cohort"], job.regime["rounds"], job.rounds["initial"]
    server, stamps = ServerApp(), []

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = FedAvg(1.0, 0.0, min_train_nodes=clients, min_available_nodes=clients)
        found = strategy.start(
            grid, ArrayRecord({"flat": torch.from_numpy(initial)}), num_rounds=rounds, timeout=600,
            evaluate_fn=lambda round, arrays: stamps.append(time.perf_counter()),
        )  # fmt: skip
        loss = dict(found.train_metrics_clientapp[rounds])["train_loss"]
        final = found.arrays.to_torch_state_dict()["flat"].numpy()
        report(out, np.diff(stamps).tolist(), final, float(loss))

    resources = {"num_cpus": 1, "num_gpus": 0.0}
    backend = {"client_resources": resources, "init_args": {"num_cpus": int(actors), "include_dashboard": False}}
    run_simulation(server, app, clients, backend_config=backend)


if __name__ == "__main__":
    main()
