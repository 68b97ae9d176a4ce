from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from actors.driver_actor import Reporter, run_on_driver
from actors.session import ensure_ray
from fedtailor.core.errors import ClientError, Interrupted, PlacementError, WorkerError
from fedtailor.core.settings import EngineConfig

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def start(payload: dict[str, Any], on_event: Any = lambda _: None, should_stop: Any = lambda: False) -> Any:
    return run_on_driver("fake_worker:drive", payload, EngineConfig(), on_event, should_stop)


def assert_gone(pids: list[int]) -> None:
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    assert psutil.wait_procs(processes, timeout=10)[1] == []


def test_an_address_where_nobody_listens_is_refused_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(PlacementError, match=rf"no Ray cluster listens at engine.address={address}"):
            ensure_ray(address)


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


def test_a_reporter_forgets_what_was_read() -> None:
    reporter = Reporter()
    for i in range(3):
        reporter.event({"i": i})
    assert [event["i"] for event in reporter.read(1)] == [1, 2]
    assert [event["i"] for event in reporter.read(0)] == [1, 2]
    assert reporter.read(3) == []
    reporter.event({"i": 3})
    assert [event["i"] for event in reporter.read(3, wait_s=5)] == [3]
