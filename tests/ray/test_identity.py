"""Serial and Ray give the same bytes, with any number of actors, and when actors die in between."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import run_tiny, tiny

from actors.ray_pool import RayPool
from fedtailor.core.settings import EngineConfig
from fedtailor.federated.pool import OnEvent
from fedtailor.storage.digest import digest
from fedtailor.storage.run_folder import RunFolder

pytestmark = pytest.mark.ray


def digest_of(run: RunFolder) -> str:
    return digest(run.storage, run.run_id)


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> str:
    return digest_of(run_tiny(tiny(tmp_path_factory.mktemp("serial"))))


class Lent(RayPool):
    """Lent to one run after the other, whose ends are not its own."""

    def to(self, on_event: OnEvent) -> RayPool:
        self.on_event = on_event
        return self

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def two_actors(cluster: None) -> Iterator[Lent]:
    """They serve runs as they serve a run's stages, and cost seconds to start."""
    pool = Lent(EngineConfig(actors=2, num_cpus=0.5), lambda event: None)
    yield pool
    RayPool.close(pool)


def on_ray(folder: Path, actors: int | Lent, *overrides: str, events: list[dict[str, Any]] | None = None) -> RunFolder:
    number = actors if isinstance(actors, int) else actors.size
    exp = tiny(folder, "engine.backend=ray", f"engine.actors={number}", "engine.num_cpus=0.5", *overrides)
    lent = actors.to if isinstance(actors, Lent) else lambda on_event: RayPool(exp.engine, on_event)
    return run_tiny(exp, pool=lent, events=events)


def test_ray_equals_serial_digest_for_digest(cluster: None, serial: str, tmp_path: Path) -> None:
    """With three actors; two are those that are killed below, and jobs (`test_jobs`) have one."""
    assert digest_of(on_ray(tmp_path, 3)) == serial


@pytest.mark.parametrize("base", ["feddpa", "dept"])
def test_what_clients_keep_of_their_base_travels_the_same_on_ray(two_actors: Lent, tmp_path: Path, base: str) -> None:
    only = (f"base.name={base}", f"{base}.lr=2e-3", f"{base}.batch_size=16", "methods=[base,fedp2eft]", "budgets=[1]")
    alone = run_tiny(tiny(tmp_path / "serial", *only))
    assert digest_of(on_ray(tmp_path / "ray", two_actors, *only)) == digest_of(alone)


def test_an_actor_killed_in_the_middle_changes_nothing(two_actors: Lent, serial: str, tmp_path: Path) -> None:
    class Killer(list):  # type: ignore[type-arg]
        killed = 0

        def append(self, event: dict[str, Any]) -> None:
            super().append(event)
            if event["kind"] == "segment" and len(self) > 8 * (self.killed + 1) and self.killed < 2:
                self.killed += 1
                os.kill(event["pid"], signal.SIGKILL)

    events = Killer()
    run = on_ray(tmp_path, two_actors, events=events)
    assert events.killed == 2
    assert digest_of(run) == serial
    lost = [e for e in events if e["kind"] == "pool" and e["event"] == "actor_lost"]
    assert len(lost) >= 2
    frame = run.metrics()
    assert not frame.duplicated(["stage", "method", "round", "client", "budget", "module", "metric"]).any()


def test_one_actor_per_client_agrees_to_rounding(cluster: None, tmp_path: Path) -> None:
    only = (
        "methods=[base]",
        "base.rounds=1",
        "task.languages=[eng,yor]",
        "task.clients_per_language=1",
        "base.cohort=2",
        "strategy.cohort=2",
        "personalise.pools=[unseen]",
        "fedavg.adapter=lora",
    )
    pooled = run_tiny(tiny(tmp_path / "pool", *only)).metrics()
    single = on_ray(tmp_path / "single", 1, *only, "engine.mode=per_client", "engine.num_cpus=0.1").metrics()
    key = ["stage", "client", "metric"]
    merged = pooled.merge(single, on=key, suffixes=("", "_single"))
    assert len(merged) == len(pooled) == len(single)
    assert (merged.value - merged.value_single).abs().max() < 1e-4
