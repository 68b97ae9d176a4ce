from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from fake_worker import FakeWorker, play_in_bundles, stage
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.ray_errors import ActorLoss
from actors.ray_pool import RayPool
from actors.session import ensure_ray
from fedtailor.core.errors import ClientError, PlacementError, WorkerError
from fedtailor.core.messages import SegmentJob, SegmentResult
from fedtailor.core.settings import EngineConfig

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

SHARED = np.linspace(0, 1, 4, dtype=np.float32)
MakePool = Callable[..., tuple[RayPool, list[dict[str, Any]]]]


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    pools = []

    def make(**engine: Any) -> tuple[RayPool, list[dict[str, Any]]]:
        events: list[dict[str, Any]] = []
        config = EngineConfig(**({"actors": 2, "num_cpus": 0.5} | engine))
        pool = RayPool(config, events.append, worker="fake_worker:FakeWorker", merge="fake_worker:merge")
        pools.append(pool)
        return pool, events

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture(scope="module")
def shared_pool() -> Iterator[tuple[RayPool, list[dict[str, Any]]]]:
    """For faults that kill: two actors that were paid for once."""
    events: list[dict[str, Any]] = []
    config = EngineConfig(actors=2, num_cpus=0.5, deadline_s=2.0)
    pool = RayPool(config, events.append, worker="fake_worker:FakeWorker", merge="fake_worker:merge")
    yield pool, events
    pool.close()


def jobs(round: int = 0, segments: int = 4) -> list[SegmentJob]:
    """Segments of different size, so that the largest is not the first."""
    return [
        SegmentJob("strategy/fake/seed1", round, i, tuple(f"c{i}-{k}" for k in range(i + 2))) for i in range(segments)
    ]


def serial(work: list[SegmentJob], folder: Path) -> list[SegmentResult]:
    """What an undisturbed run in this process gives."""
    folder.mkdir(exist_ok=True)
    worker = FakeWorker()
    worker.open(stage(folder))
    return [worker.run(job, SHARED) for job in work]


def assert_same(found: list[SegmentResult], expected: list[SegmentResult]) -> None:
    assert [result.index for result in found] == [result.index for result in expected]
    for one, two in zip(found, expected, strict=True):
        assert one.partial.tobytes() == two.partial.tobytes()
        assert (one.metrics, one.valid) == (two.metrics, two.valid)
        assert {k: v.tolist() for k, v in one.private.items()} == {k: v.tolist() for k, v in two.private.items()}


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["kind"] for event in events if event["event"] == "actor_lost"]


def wait_for_actors(pool: RayPool, count: int) -> list[int]:
    """Plays empty rounds until so many are up."""
    limit = time.monotonic() + 30
    while len(pool.hosts()) < count:
        assert time.monotonic() < limit
        pool.run(jobs(99, 1), SHARED, lambda _: None)
    return [host.pid for host in pool.hosts()]


@pytest.mark.parametrize("actors", [1, 2, 3])
def test_any_number_of_actors_gives_the_bytes_of_a_serial_run_in_job_order(
    make_pool: MakePool, actors: int, tmp_path: Path
) -> None:
    pool, events = make_pool(actors=actors)
    info = pool.open(stage(tmp_path))
    assert info.initial.shape == (4,)
    counted: list[int] = []
    for round in range(3):
        found = pool.run(jobs(round), SHARED, lambda result: counted.append(result.index))
        assert_same(found, serial(jobs(round), tmp_path / "serial"))
    assert sorted(counted) == sorted([0, 1, 2, 3] * 3)
    assert (pool.size, kinds(events)) == (actors, [])


@pytest.mark.parametrize("fault", ["kill", "kill_after"])
def test_a_killed_actor_s_segment_is_played_again_and_counted_once(
    shared_pool: tuple[RayPool, list[dict[str, Any]]], fault: str, tmp_path: Path
) -> None:
    pool, events = shared_pool
    events.clear()
    pool.open(stage(tmp_path, **{fault: [2]}))
    counted: list[int] = []
    found = pool.run(jobs(), SHARED, lambda result: counted.append(result.index))
    assert_same(found, serial(jobs(), tmp_path / "serial"))
    assert sorted(counted) == [0, 1, 2, 3]
    assert [result.attempt for result in found] == [0, 0, 1, 0]
    assert kinds(events) == ["death"]
    lost, retried = (next(e for e in events if e["event"] == name) for name in ("actor_lost", "job_retried"))
    assert "pid" in lost["host"]
    assert lost["node"]
    assert (retried["segment"], retried["attempt"], retried["clients"]) == (2, 1, list(jobs()[2].clients))
    assert (tmp_path / "runs").read_text().split("\n").count("0 2 1") == 1


def test_all_actors_killed_at_once_are_rebuilt_and_the_round_finishes(
    shared_pool: tuple[RayPool, list[dict[str, Any]]], tmp_path: Path
) -> None:
    pool, events = shared_pool
    pool.open(stage(tmp_path, sleep=0.3))
    pids = wait_for_actors(pool, 2)
    events.clear()
    killer = threading.Timer(0.1, lambda: [os.kill(pid, signal.SIGKILL) for pid in pids])
    killer.start()
    found = pool.run(jobs(), SHARED, lambda _: None)
    assert_same(found, serial(jobs(), tmp_path / "serial"))
    assert kinds(events) == ["death", "death"]
    assert not set(pids) & {host.pid for host in pool.hosts()}


def test_actors_killed_between_rounds_are_replaced(
    shared_pool: tuple[RayPool, list[dict[str, Any]]], tmp_path: Path
) -> None:
    pool, _ = shared_pool
    pool.open(stage(tmp_path))
    for pid in wait_for_actors(pool, 2):
        os.kill(pid, signal.SIGKILL)
    assert_same(pool.run(jobs(1), SHARED, lambda _: None), serial(jobs(1), tmp_path / "serial"))


@pytest.mark.parametrize(("fault", "stack"), [("hang", "_wait_for_godot"), ("freeze", "no stack: GetTimeoutError")])
def test_a_hung_actor_meets_the_deadline_shows_its_stack_and_is_replaced(
    shared_pool: tuple[RayPool, list[dict[str, Any]]], fault: str, stack: str, tmp_path: Path
) -> None:
    pool, events = shared_pool
    events.clear()
    pool.open(stage(tmp_path, **{fault: [3]}))
    found = pool.run(jobs(), SHARED, lambda _: None)
    assert_same(found, serial(jobs(), tmp_path / "serial"))
    lost = next(event for event in events if event["event"] == "actor_lost")
    assert (lost["kind"], lost["cause"]) == ("hang", "no answer within engine.deadline_s=2")
    assert stack in lost["stack"]


def test_a_segment_that_kills_every_actor_is_named_and_the_pool_lives_on(make_pool: MakePool, tmp_path: Path) -> None:
    pool, events = make_pool(retries=1)
    pool.open(stage(tmp_path, always_kill=[1]))
    with pytest.raises(WorkerError, match=r"segment 1 of strategy/fake/seed1, round 0 \(clients c1-0, c1-1, c1-2\)"):
        pool.run(jobs(), SHARED, lambda _: None)
    assert kinds(events) == ["death", "death"]
    pool.open(stage(tmp_path))
    assert_same(pool.run(jobs(1), SHARED, lambda _: None), serial(jobs(1), tmp_path / "serial"))


def test_an_error_on_purpose_comes_back_as_itself_untried_again_and_its_late_companions_do_not_count(
    shared_pool: tuple[RayPool, list[dict[str, Any]]], tmp_path: Path
) -> None:
    pool, events = shared_pool
    pool.open(stage(tmp_path, client_error=[2], slow=[0, 1, 3]))
    wait_for_actors(pool, 2)
    events.clear()
    with pytest.raises(ClientError) as error:
        pool.run(jobs(0), SHARED, lambda _: None)
    assert (error.value.client, error.value.round, error.value.cause) == ("c2-0", 0, "no examples")
    counted: list[int] = []
    found = pool.run(jobs(1), SHARED, lambda result: counted.append(result.round))
    assert_same(found, serial(jobs(1), tmp_path / "serial"))
    assert counted == [1, 1, 1, 1]
    assert events == []
    assert (tmp_path / "runs").read_text().split("\n").count("0 2 0") == 1


def test_a_bug_is_not_tried_again_and_keeps_its_traceback(
    shared_pool: tuple[RayPool, list[dict[str, Any]]], tmp_path: Path
) -> None:
    pool, _ = shared_pool
    pool.open(stage(tmp_path, bug=[0]))
    with pytest.raises(WorkerError, match=r"(?s)ZeroDivisionError.*_misbehave.*a mistake in method code"):
        pool.run(jobs(segments=1), SHARED, lambda _: None)
    assert (tmp_path / "runs").read_text() == "0 0 0\n"


def test_a_death_while_opening_is_survived(make_pool: MakePool, tmp_path: Path) -> None:
    pool, events = make_pool(actors=1)
    pool.open(stage(tmp_path, kill_open=True))
    assert [event["during"] for event in events if event["event"] == "actor_lost"] == ["open"]


def test_deaths_while_opening_end_with_their_causes(make_pool: MakePool, tmp_path: Path) -> None:
    pool, _ = make_pool(actors=1, retries=1)
    with pytest.raises(WorkerError, match="died 2 times before it could open strategy/fake/seed1: death: "):
        pool.open(stage(tmp_path, always_kill_open=True))


def test_actors_that_open_a_stage_differently_are_refused(make_pool: MakePool, tmp_path: Path) -> None:
    pool, _ = make_pool()
    with pytest.raises(WorkerError, match="another initial state"):  # noqa: PT012
        pool.open(stage(tmp_path, unequal=True))
        wait_for_actors(pool, 3)


def test_after_running_out_of_memory_the_pool_goes_on_smaller_until_the_next_stage(
    shared_pool: tuple[RayPool, list[dict[str, Any]]], tmp_path: Path
) -> None:
    pool, events = shared_pool
    pool.open(stage(tmp_path))
    wait_for_actors(pool, 2)
    events.clear()
    pool._supervisor.handle_loss(pool._supervisor.slots[0], ActorLoss("oom", "7 GB of 6 GB"), shrink=True)
    assert (pool.size, [event["event"] for event in events]) == (1, ["pool_shrunk"])
    assert_same(pool.run(jobs(), SHARED, lambda _: None), serial(jobs(), tmp_path / "serial"))
    pool.open(stage(tmp_path))
    assert pool.size == 2


def test_private_state_and_shared_state_arrive_and_the_caller_s_arrays_stay(
    shared_pool: tuple[RayPool, list[dict[str, Any]]], tmp_path: Path
) -> None:
    pool, _ = shared_pool
    pool.open(stage(tmp_path))
    shared, row = SHARED.copy(), np.full(1, 5, np.float32)
    work = [replace(jobs()[0], private={"c0-0": row})]
    (result,) = pool.run(work, shared, lambda _: None)
    assert (result.private["c0-0"][0], result.private["c0-1"][0], row[0]) == (6.0, 1.0, 5.0)
    assert shared.tobytes() == SHARED.tobytes()
    assert {"pid", "node", "hostname"} <= result.host.keys()


def test_no_jobs_give_no_results_and_a_stage_without_shared_state_gets_none(
    shared_pool: tuple[RayPool, list[dict[str, Any]]], tmp_path: Path
) -> None:
    pool, _ = shared_pool
    pool.open(stage(tmp_path))
    assert pool.run([], SHARED, lambda _: None) == []
    (result,) = pool.run(jobs(segments=1), None, lambda _: None)
    assert not np.array_equal(result.partial, serial(jobs(segments=1), tmp_path / "serial")[0].partial)


def test_per_client_mode_gives_every_client_an_actor_and_merges_to_the_same_segments(
    make_pool: MakePool, tmp_path: Path
) -> None:
    pool, _ = make_pool(mode="per_client", num_cpus=0.1)
    pool.open(stage(tmp_path, kill=[1]))
    work = jobs(segments=2)
    counted: list[int] = []
    found = pool.run(work, SHARED, lambda result: counted.append(result.index))
    assert sorted(counted) == [0, 1]
    assert pool.size == 5
    for one, two in zip(found, serial(work, tmp_path / "serial"), strict=True):
        assert one.valid == two.valid
        assert one.metrics == two.metrics
        np.testing.assert_allclose(one.partial, two.partial, rtol=1e-6)
    tries = [line.split() for line in (tmp_path / "runs").read_text().splitlines()]
    assert [attempt for _, _, attempt in tries].count("0") == 5  # one was killed once, and played again


def test_per_client_mode_refuses_a_cohort_that_does_not_fit(make_pool: MakePool, tmp_path: Path) -> None:
    pool, _ = make_pool(mode="per_client", num_cpus=1)
    pool.open(stage(tmp_path))
    clients = tuple(f"c{i}" for i in range(4 * (os.cpu_count() or 1)))
    with pytest.raises(PlacementError, match=rf"{len(clients)} actors of 1 CPU each do not fit.*Lower the cohort"):
        pool.run([SegmentJob("strategy/fake/seed1", 0, 0, clients)], SHARED, lambda _: None)


@pytest.mark.parametrize("engine", [{"num_gpus": 0.5}, {"memory_gb": 8.0}, {"actors": 10_000}])
def test_what_cannot_be_placed_is_refused_in_seconds(make_pool: MakePool, engine: dict[str, Any]) -> None:
    started = time.monotonic()
    with pytest.raises(PlacementError, match=r"has \d+ CPU, 0 GPU"):
        make_pool(**engine)
    assert time.monotonic() - started < 30  # Ray itself would wait for ever


def test_closing_ends_the_actors_but_not_a_cluster_that_others_started(make_pool: MakePool, tmp_path: Path) -> None:
    pool, _ = make_pool()
    pool.open(stage(tmp_path))
    pids = wait_for_actors(pool, 2)
    pool.close()
    assert ray.is_initialized()
    assert not ensure_ray().started
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert alive == []


def test_a_local_cluster_listens_on_the_loopback_interface_only(cluster: None) -> None:
    processes = psutil.Process().children(recursive=True)
    listening = {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert all(address.removeprefix("::ffff:") in ("127.0.0.1", "::1") for address in listening)


def test_engine_threads_reach_torch_in_the_actor(tmp_path: Path) -> None:
    config = EngineConfig(actors=1, num_cpus=0.5, threads=2)
    pool = RayPool(config, lambda _: None, worker="torch_worker:ThreadWorker")
    try:
        pool.open(stage(tmp_path))
        (result,) = pool.run(jobs(segments=1), None, lambda _: None)
        assert (result.host["torch"], result.host["OMP_NUM_THREADS"]) == (2, "2")
    finally:
        pool.close()


def test_inside_a_placement_group_the_pool_takes_the_group_s_bundles_and_nothing_else(tmp_path: Path) -> None:
    group = placement_group([{"CPU": 0.25}, {"CPU": 0.5}])
    ray.get(group.ready(), timeout=30)
    before = ray.available_resources()["CPU"]
    trial = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    play = ray.remote(num_cpus=0.25, scheduling_strategy=trial)(play_in_bundles)
    size, _, left = ray.get(play.remote(str(tmp_path)), timeout=60)
    remove_placement_group(group)
    assert (size, left) == (2, before)
