from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from actors import driver_actor
from actors.driver_actor import DriverActor, Reporter, run_on_driver
from actors.session import ensure_ray
from fedtailor.core.errors import ClientError, ConfigError, Interrupted, PlacementError, WorkerError
from fedtailor.core.settings import EngineConfig

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def start(
    payload: dict[str, Any],
    on_event: Any = lambda _: None,
    should_stop: Any = lambda: False,
    config: EngineConfig = EngineConfig(),  # noqa: B008 - frozen
) -> Any:
    return run_on_driver("fake_worker:drive", payload, config, on_event, should_stop)


def assert_gone(pids: list[int]) -> None:
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    assert psutil.wait_procs(processes, timeout=10)[1] == []


def test_an_address_where_nobody_listens_is_refused_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(PlacementError, match=rf"no Ray cluster listens at engine.address={address}"):
            ensure_ray(address)


def test_a_cluster_that_does_not_start_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(**how: Any) -> None:
        raise Exception("The current node timed out during startup.\nMore of it.")  # as Ray does

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(
        PlacementError, match=r"did not start \(The current node timed out.*\); .*engine.backend=serial$"
    ):
        ensure_ray("local")


def test_every_event_arrives_once_in_order_and_the_result_comes_back() -> None:
    events: list[dict[str, Any]] = []
    assert start({"do": "count", "events": 500}, events.append) == 500
    assert [event["number"] for event in events] == list(range(500))
    assert ray.is_initialized()


def test_a_stop_reaches_the_run_and_its_interruption_comes_back_as_itself() -> None:
    events: list[dict[str, Any]] = []
    with pytest.raises(Interrupted, match="stopped at a commit"):  # unasked, it would end otherwise
        start({"do": "wait for stop"}, events.append, lambda: bool(events))


def test_an_error_on_purpose_comes_back_with_its_fields() -> None:
    with pytest.raises(ClientError) as error:
        start({"do": "fail"})
    assert (error.value.client, error.value.round) == ("seen/amh/00", 3)


def test_when_the_driver_dies_its_actors_die_with_it_and_the_error_says_how_to_go_on(tmp_path: Path) -> None:
    pids: list[int] = []

    def kill_driver(event: dict[str, Any]) -> None:
        if "driver" in event:
            pids.extend(event["clients"])
            os.kill(event["driver"], signal.SIGKILL)

    with pytest.raises(WorkerError, match=r"driver process was lost \(death\).*resume the run"):
        start({"do": "pool", "folder": str(tmp_path)}, kill_driver)
    assert len(pids) == 2
    assert_gone(pids)


def test_the_watcher_s_error_ends_the_driver() -> None:
    pids: list[int] = []

    def fail(event: dict[str, Any]) -> None:
        pids.append(event["driver"])
        raise RuntimeError("the terminal is gone")

    with pytest.raises(RuntimeError, match="the terminal is gone"):
        start({"do": "wait for stop"}, fail)
    assert_gone(pids)


class Pool:
    """Where `RayPool` stands, without Ray."""

    def __init__(self, config: EngineConfig, on_event: Any, run: str = "", worker: str = "") -> None:
        self.config, self.on_event, self.run, self.worker = config, on_event, run, worker
        self.closed = False

    def close(self) -> None:
        self.closed = True


MINE = EngineConfig(actors=1, num_cpus=0.5)
ASKED: dict[str, tuple[dict[str, Any], EngineConfig | None, dict[str, str], list[bool]]] = {
    "its own": ({"begin": True}, MINE, {}, [False]),
    "its own elsewhere": ({"begin": True}, MINE.model_copy(update={"address": "auto"}), {}, [False]),
    "another engine": ({"begin": True}, EngineConfig(actors=2), {}, [True, False]),
    "another worker": ({"begin": True}, MINE, {"worker": "own:Worker"}, [True, False]),
    "none": ({"begin": True}, None, {}, [True]),
    "late": ({"begin": False}, MINE, {}, [False]),
    "late none": ({}, None, {}, []),
}
"""What a function asks of the driver: its payload, the pool it wants; and which of the pools made are closed then."""


@pytest.mark.parametrize("name", ASKED)
def test_actors_come_up_before_the_function_is_imported_and_serve_it_or_nobody(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload, wanted, options, closed = ASKED[name]
    made: list[Pool] = []
    before: list[int] = []
    heard: list[Any] = []

    def make(*words: Any, **named: Any) -> Pool:
        made.append(Pool(*words, **named))
        return made[-1]

    def entry(_: Any, make_pool: Any, on_event: Any, should_stop: Any) -> None:
        if wanted is not None:
            assert make_pool(wanted, heard.append, **options) is made[-1]

    def imported(_: str) -> Any:
        before.append(len(made))
        return entry

    monkeypatch.setattr(driver_actor, "RayPool", make)
    monkeypatch.setattr(driver_actor, "counting_commits", lambda on_event, run: on_event)
    monkeypatch.setattr(driver_actor, "resolve", imported)
    DriverActor().run("own:run", {**payload, "run_id": "r"}, MINE, {}, "")
    assert before == [int(payload.get("begin", False))]
    assert [pool.closed for pool in made] == closed
    assert {pool.run for pool in made} <= {"r"}
    if wanted is not None:
        assert (made[-1].on_event, made[-1].worker) == (heard.append, options.get("worker", ""))


def test_actors_end_with_a_function_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Pool] = []
    monkeypatch.setattr(driver_actor, "RayPool", lambda *words, **named: made.append(Pool(*words, **named)) or made[-1])
    with pytest.raises(ConfigError, match="no_such_module"):
        DriverActor().run("no_such_module:run", {"begin": True}, MINE, {}, "")
    assert [pool.closed for pool in made] == [True]


def test_a_run_that_is_refused_leaves_no_actors_that_came_up_for_it() -> None:
    def client_actors() -> list[str]:
        return [actor["State"] for actor in ray._private.state.actors().values() if "ClientActor" in str(actor)]

    before = len(client_actors())
    with pytest.raises(ClientError):
        start({"do": "fail", "begin": True}, config=MINE)
    until = time.monotonic() + 10
    while set(client_actors()) != {"DEAD"} and time.monotonic() < until:
        time.sleep(0.1)
    assert client_actors() == ["DEAD"] * (before + 1)


def test_a_reporter_forgets_what_was_read() -> None:
    reporter = Reporter()
    for i in range(3):
        reporter.event({"i": i})
    assert [event["i"] for event in reporter.read(1)] == [1, 2]
    assert [event["i"] for event in reporter.read(0)] == [1, 2]
    assert reporter.read(3) == []
    reporter.event({"i": 3})
    assert [event["i"] for event in reporter.read(3, wait_s=5)] == [3]
