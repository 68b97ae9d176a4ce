"""What a trial of a sweep does about processes, without a model: in a file that trials can import."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ray
from fake_worker import stage
from ray import tune

from actors.ray_pool import RayPool
from fedtailor.core.messages import SegmentJob
from fedtailor.core.settings import EngineConfig


def place(config: dict[str, Any]) -> None:
    """A trial that makes a pool as a run does, and reports in which bundles its actors are."""
    folder = Path(config["folder"])
    pool = RayPool(EngineConfig(), print, worker="fake_worker:FakeWorker")
    pool.open(stage(folder))
    while len(pool.hosts()) < pool.size:
        pool.run([SegmentJob("strategy/fake/seed1", 0, 0, ("a",))], None, lambda _: None)
    groups = ray.util.placement_group_table()
    (folder / f"trial-{config['number']}").touch()
    if config["meet"]:  # trials that are there at once see each other
        deadline = time.monotonic() + 60
        while len(list(folder.glob("trial-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    tune.report(
        {
            "mine": ray.get_runtime_context().get_assigned_resources(),
            "group": ray.util.get_current_placement_group().id.hex(),
            "actors": [ray.get(slot.actor.__ray_call__.remote(_where)) for slot in pool._supervisor.slots],
            "groups": sum(group["state"] == "CREATED" for group in groups.values()),
            "together": len(list(folder.glob("trial-*"))),
        }
    )
    pool.close()


def _where(_: Any) -> tuple[str, float]:
    context = ray.get_runtime_context()
    return context.get_placement_group_id(), context.get_assigned_resources().get("CPU", 0.0)
