"""Serial and Ray give the same bytes, with any number of actors, and when actors die in between."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny import run_tiny, tiny

from fedtailor.storage.digest import digest
from fedtailor.storage.run_folder import RunFolder

pytestmark = pytest.mark.ray


def digest_of(run: RunFolder) -> str:
    return digest(run.storage, run.run_id)


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> str:
    return digest_of(run_tiny(tiny(tmp_path_factory.mktemp("serial"))))


def on_ray(folder: Path, actors: int, *overrides: str, events: list[dict[str, Any]] | None = None) -> RunFolder:
    from actors.ray_pool import RayPool

    exp = tiny(folder, "engine.backend=ray", f"engine.actors={actors}", "engine.num_cpus=0.5", *overrides)
    return run_tiny(exp, pool=lambda on_event: RayPool(exp.engine, on_event), events=events)


@pytest.mark.parametrize("actors", [1, 3])  # two are those that are killed below
def test_ray_equals_serial_digest_for_digest(cluster: None, serial: str, tmp_path: Path, actors: int) -> None:
    assert digest_of(on_ray(tmp_path, actors)) == serial


@pytest.mark.parametrize("base", ["feddpa", "dept"])
def test_what_clients_keep_of_their_base_travels_the_same_on_ray(cluster: None, tmp_path: Path, base: str) -> None:
    only = (f"base.name={base}", f"{base}.lr=2e-3", f"{base}.batch_size=16", "methods=[base,fedp2eft]", "budgets=[1]")
    alone = run_tiny(tiny(tmp_path / "serial", *only))
    assert digest_of(on_ray(tmp_path / "ray", 2, *only)) == digest_of(alone)


def test_an_actor_killed_in_the_middle_changes_nothing(cluster: None, serial: str, tmp_path: Path) -> None:
    class Killer(list):  # type: ignore[type-arg]
        killed = 0

        def append(self, event: dict[str, Any]) -> None:
            super().append(event)
            if event["kind"] == "segment" and len(self) > 8 * (self.killed + 1) and self.killed < 2:
                self.killed += 1
                os.kill(event["pid"], signal.SIGKILL)

    events = Killer()
    run = on_ray(tmp_path, 2, events=events)
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
        "task.clients_per_language=1",
        "base.cohort=3",
        "strategy.cohort=3",
        "fedavg.adapter=lora",
    )
    pooled = on_ray(tmp_path / "pool", 1, *only).metrics()
    single = on_ray(tmp_path / "single", 1, *only, "engine.mode=per_client", "engine.num_cpus=0.1").metrics()
    key = ["stage", "client", "metric"]
    merged = pooled.merge(single, on=key, suffixes=("", "_single"))
    assert len(merged) == len(pooled) == len(single)
    assert (merged.value - merged.value_single).abs().max() < 1e-4
