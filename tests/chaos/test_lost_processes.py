"""Workers, nodes, the control store and the driver's own node are lost; processes, clusters and exit codes are real.

With the soak in small, on the same cluster: every kind of fault once, and every invariant checked.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import null_rounds
import psutil
import pytest
from clusters import Nodes, nodes
from inspection import committed, full_digest, open_run
from real_process import Process, trace
from scenarios import Injury, Scenario, kinds_once
from soak import CONFIG, PARTS, Soak
from test_kill_and_resume import CHAOS
from tiny import TINY, run_tiny, tiny

from fedtailor.storage.digest import digest

pytestmark = pytest.mark.ray
LIMIT_S = 300


@pytest.fixture(scope="module")
def shared() -> Iterator[Nodes]:
    with nodes(2, gpus=2) as made:
        yield made


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run, without Ray: the digest is the same."""
    folder = tmp_path_factory.mktemp("clean")
    process = Process(folder, words(folder, None, "engine.backend=serial"))
    assert process.wait(LIMIT_S) == 0, process.output()
    return folder


@pytest.fixture
def folder(clean: Path, tmp_path: Path) -> Path:
    for pattern in PARTS:
        for part in (clean / "artifacts").glob(pattern):
            shutil.copytree(part, tmp_path / "artifacts" / part.name)
    return tmp_path


def words(folder: Path, address: str | None, *more: str) -> list[str]:
    where = [f"engine.address={address}"] if address else []
    return ["run", *CONFIG, *where, f"storage={folder}", "--run-id", "run", *more]


def pool_events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [e for e in trace(folder) if e["kind"] == "pool" and e.get("event") == name]


def wait_for(condition: Callable[[], object], process: Process) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.running(), process.output()
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.02)


def rounds(folder: Path) -> int:
    return len(list(folder.glob("artifacts/base-*/rounds/*/COMMIT.json")))


def worker_pids(folder: Path) -> set[int]:
    return {int(e["pid"]) for e in trace(folder) if e["kind"] == "segment"}


def test_all_workers_killed_at_once_are_rebuilt_and_the_run_goes_on(shared: Nodes, clean: Path, folder: Path) -> None:
    """F4."""
    process = Process(folder, words(folder, shared.address), "slow stage=base round=3 seconds=3")
    wait_for(lambda: rounds(folder) == 3 and len(worker_pids(folder)) == 2, process)
    time.sleep(0.5)
    for pid in worker_pids(folder):
        os.kill(pid, signal.SIGKILL)
    assert process.wait(LIMIT_S) == 0, process.output()
    assert full_digest(folder) == full_digest(clean)
    assert len(pool_events(folder, "actor_lost")) == 2
    assert all(e["how"] == "death" and e["node"] and e["cause"] for e in pool_events(folder, "actor_lost"))


def test_a_client_whose_worker_always_dies_ends_the_run_with_every_cause(shared: Nodes, folder: Path) -> None:
    process = Process(
        folder, words(folder, shared.address, "engine.retries=1"), "kill stage=base round=2 segment=1 attempt=always"
    )
    assert process.wait(LIMIT_S) == 6
    told = " ".join(process.output().split())
    assert "segment 1 of base/seed42, round 2" in told
    assert "was lost 2 times, engine.retries=1: try 1: death" in told
    assert rounds(folder) == 2
    assert open_run(folder).status()["state"] == "failed"


@pytest.mark.chaos_long
@pytest.mark.parametrize("kind", ["hang", "stop"])
def test_a_worker_that_hangs_meets_its_deadline_and_is_replaced(
    shared: Nodes, clean: Path, folder: Path, kind: str
) -> None:
    """F3: with a stack where the process can still answer."""
    more = ("engine.deadline_s=60",)
    process = Process(folder, words(folder, shared.address, *more), f"{kind} stage=base round=2 segment=0 step=1")
    assert process.wait(LIMIT_S) == 0, process.output()
    assert full_digest(folder) == full_digest(clean)
    [lost] = pool_events(folder, "actor_lost")
    assert lost["how"] == "hang"
    assert ("in strike" in lost["stack"]) == (kind == "hang")


@pytest.mark.chaos_long
def test_the_control_store_lost_ends_the_command_and_another_cluster_goes_on_where_it_was(
    clean: Path, folder: Path
) -> None:
    """F8: Ray ends a driver that cannot reach its GCS (after a minute by default, here after five seconds)."""
    with nodes(2, system={"gcs_rpc_server_reconnect_timeout_s": 5}) as cluster:
        process = Process(folder, words(folder, cluster.address), "slow stage=base round=4 seconds=3")
        wait_for(lambda: rounds(folder) == 4, process)
        cluster.lose_control_store()
        assert process.wait(90) != 0
    before = committed(folder)
    assert len(before) >= 4
    with nodes(2) as other:
        count = len(trace(folder))
        process = Process(folder, words(folder, other.address))
        assert process.wait(LIMIT_S) == 0, process.output()
        resumed = [e["done"] for e in trace(folder)[count:] if e["kind"] == "progress" and e["stage"] == "base/seed42"]
    assert resumed[0] == len(before) + 1, "never from round 0 again"
    after = committed(folder)
    assert {name: after[name] for name in before} == before
    assert full_digest(folder) == full_digest(clean)


@pytest.mark.chaos_long
def test_the_driver_s_own_node_lost_the_run_goes_on_from_the_surviving_ones(clean: Path, folder: Path) -> None:
    """F7: the round loop lives in an actor on the node that is lost."""
    with nodes(2, 1) as cluster:
        process = Process(
            folder, words(folder, cluster.address), "slow stage=base round=4 seconds=4", driver_node=cluster.others[0]
        )
        wait_for(lambda: rounds(folder) == 4, process)
        time.sleep(1)
        lost = cluster.lose()
        assert process.wait(LIMIT_S) == 6, process.output()
        told = " ".join(process.output().split())
        assert "the driver process was lost (node)" in told
        assert lost in told
        assert open_run(folder).status()["state"] == "failed"
        before = committed(folder)
        assert Process(folder, words(folder, cluster.address)).wait(LIMIT_S) == 0
    after = committed(folder)
    assert {name: after[name] for name in before} == before
    assert full_digest(folder) == full_digest(clean)


@pytest.mark.chaos_long
def test_a_worker_killed_for_its_memory_is_told_as_such_and_the_pool_goes_on_smaller(clean: Path, folder: Path) -> None:
    """F22: Ray's memory monitor watches the whole machine, so its threshold is set a little above what is used now."""
    memory = psutil.virtual_memory()
    if memory.available < 10 * 2**30:
        pytest.skip("a worker takes 7 GB until Ray ends it: free 10 GB of memory to run this")
    threshold = (memory.total - memory.available + 4 * 2**30) / memory.total
    system = {"memory_usage_threshold": threshold, "memory_monitor_refresh_ms": 50}
    with nodes(2, system=system) as cluster:
        process = Process(folder, words(folder, cluster.address), "hog stage=base round=2 segment=0 mb=7000 seconds=20")
        assert process.wait(LIMIT_S) == 0, process.output()
    lost = pool_events(folder, "actor_lost")
    assert "oom" in {event["how"] for event in lost}
    assert "memory" in " ".join(event["cause"] for event in lost).lower()
    assert [event["actors"] for event in pool_events(folder, "pool_shrunk")] == [1]
    assert full_digest(folder) == full_digest(clean)


@pytest.mark.chaos_long
def test_five_hundred_rounds_through_a_small_object_store_leave_the_driver_s_memory_where_it_was(
    tmp_path: Path,
) -> None:
    """F23: half a gigabyte of SHARED state passes a store of 80 MB."""
    with nodes(2, memory=80 * 2**20) as cluster:
        process = multiprocessing.get_context("forkserver").Process(
            target=null_rounds.play, args=(cluster.address, tmp_path, 500)
        )
        process.start()
        process.join(400)
        assert process.exitcode == 0
    memory = json.loads((tmp_path / "memory.json").read_text())
    assert len(memory) == 500
    assert max(memory[400:]) - max(memory[50:100]) < 30, "megabytes"


def test_gpus_that_a_cluster_does_not_have_are_refused_with_the_numbers(shared: Nodes, folder: Path) -> None:
    """F27: three are asked of two."""
    process = Process(
        folder, words(folder, shared.address, "engine.num_gpus=1", "engine.num_cpus=0.5", "engine.actors=3")
    )
    assert process.wait(LIMIT_S) == 4
    assert time.time() - trace(folder)[0]["at"] < 60
    told = " ".join(process.output().split())
    assert "3 actors of 0.5 CPU and 1 GPU each do not fit, at most 2 do" in told
    assert "has 2 CPU, 2 GPU" in told


def command(storage: Path, words: list[str], fault: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it, with a driver actor and a report at the end."""
    env = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    env.pop("FEDTAILOR_FAULT", None)
    if fault:
        env["FEDTAILOR_FAULT"] = fault
    return subprocess.run(
        [sys.executable, "-m", "fedtailor", *words],
        env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=storage, timeout=300, check=False,
    )  # fmt: skip


def test_the_ray_driver_killed_with_its_actor_resumes(tmp_path: Path) -> None:
    """The driver actor dies at a commit of the strategy stage; the command ends non-zero and resumes."""
    alone = run_tiny(tiny(tmp_path / "alone", *CHAOS))
    storage = tmp_path / "ray"
    storage.mkdir()
    words = ["run", *TINY, *CHAOS, f"storage={storage}", "--run-id", "run", "engine.backend=ray", "engine.actors=1"]
    done = command(storage, words, "commit:after-record@5")
    assert done.returncode == 6, done.stdout
    assert "fedtailor resume run" in done.stdout
    done = command(storage, ["resume", "run", "--storage", str(storage)])
    assert done.returncode == 0, done.stdout
    assert full_digest(storage) == digest(alone.storage, alone.run_id)


@pytest.fixture(scope="module")
def soak(shared: Nodes, clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Soak:
    made = Soak(tmp_path_factory.mktemp("soak"), shared.address)
    made.learn(clean)
    return made


@pytest.mark.parametrize("scenario", kinds_once(), ids=lambda s: "+".join(i.kind for i in s.injuries))
def test_whatever_breaks_the_run_ends_complete_and_equal_to_an_undisturbed_one(soak: Soak, scenario: Scenario) -> None:
    record = soak.run(scenario)
    assert record.violations == []
    assert record.exit_codes == [5] * len(scenario.of("F13")) + [0]
    assert len(record.recovery_s) == len(scenario.of("F1", "F2", "F13"))


def test_a_lost_node_s_work_is_done_elsewhere_and_the_loss_names_it(soak: Soak) -> None:
    record = soak.run(Scenario(10, (Injury(3, "F7"),)))
    assert (record.violations, record.exit_codes) == ([], [0])
    assert record.recovery_s


def test_the_soak_tells_a_result_that_differs(soak: Soak, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "_clean", {(): ("another", "another")})
    record = soak.run(Scenario(20, ()))
    assert record.violations == ["I4: the result differs from that of the undisturbed run"]
