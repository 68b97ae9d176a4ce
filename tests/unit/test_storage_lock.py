"""One writer per artifact: a live owner is respected, a dead one is not waited for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fedtailor.core.errors import StorageError
from fedtailor.storage.files import Storage
from fedtailor.storage.lock import LOCK, Lock, LockHolder

PATH = "artifacts/base-0123"
PLATFORM = Path(__file__).parents[2] / "platform"


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(tmp_path if request.param == "local" else f"memory://{tmp_path.name}")


def leave(storage: Storage, owner: LockHolder) -> None:
    """A lock as a process leaves it that had no time to release it."""
    storage.write_json(f"{PATH}/{LOCK}", asdict(owner))


def elsewhere(name: str = "remote") -> LockHolder:
    return replace(LockHolder.here(name), host="far-away", machine="another boot/1", pid=1)


def test_a_second_live_owner_is_refused_and_told_who_holds_it(storage: Storage) -> None:
    with Lock(storage, PATH, "first") as held:
        with pytest.raises(StorageError, match=r"LOCK is held by run 'first' \(process \d+ on "):
            Lock(storage, PATH, "second").__enter__()
        held.check()
    assert storage.list(PATH) == []
    with Lock(storage, PATH, "second"):
        pass


def test_the_lock_is_given_back_after_an_error(storage: Storage) -> None:
    with pytest.raises(KeyError), Lock(storage, PATH, "first"):
        raise KeyError
    assert storage.list(PATH) == []


def test_a_waiting_owner_says_so_and_goes_on_when_the_lock_is_free(storage: Storage) -> None:
    messages: list[str] = []
    order: list[str] = []

    def second() -> None:
        with Lock(storage, PATH, "second", on_wait=messages.append):
            order.append("second")

    thread = threading.Thread(target=second)
    with Lock(storage, PATH, "first"):
        thread.start()
        while not messages:
            time.sleep(0.01)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert messages[0].startswith("waiting for run 'first'")


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(PLATFORM)!r})\n"
        "from fedtailor.storage.lock import Lock\n"
        "from fedtailor.storage.files import Storage\n"
        f"with Lock(Storage(sys.argv[1]), {PATH!r}, 'dead'):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    # Not reaped: its pid still exists, as that of a worker whose parent is busy.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert (tmp_path / PATH / LOCK).exists()
    events: list[dict[str, Any]] = []
    started = time.monotonic()
    with Lock(Storage(tmp_path), PATH, "second", on_event=events.append) as held:
        assert time.monotonic() - started < 5
        held.check()
    assert [event["event"] for event in events] == ["lock-taken-over"]
    assert "run 'dead'" in events[0]["from"]
    assert events[0]["reason"] == "its process is gone"
    assert process.wait(10) == -signal.SIGKILL


def test_a_reused_pid_does_not_keep_a_lock_alive(storage: Storage) -> None:
    leave(storage, replace(LockHolder.here("rebooted"), started="1"))
    with Lock(storage, PATH, "second"):
        pass


def test_a_lock_of_another_machine_without_heartbeat_is_taken_over(storage: Storage) -> None:
    leave(storage, elsewhere())
    events: list[dict[str, Any]] = []
    with Lock(storage, PATH, "second", on_event=events.append, stale_s=0.3):
        assert json.loads(storage.read_bytes(f"{PATH}/{LOCK}"))["owner"] == "second"
    assert events[0]["reason"] == "no heartbeat for 0.3 s"


def test_a_lock_of_another_machine_with_a_heartbeat_is_respected(storage: Storage) -> None:
    owner = elsewhere()
    leave(storage, owner)
    done = threading.Event()

    def beat() -> None:
        count = 0
        while not done.wait(0.05):
            count += 1
            storage.write_bytes(f"{PATH}/{LOCK}-{owner.token}.beat", b"%d" % count)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(StorageError, match=r"'remote' .* on far-away"):
            Lock(storage, PATH, "second", stale_s=5.0).__enter__()
    finally:
        done.set()
        thread.join()


def test_a_holder_beats_and_notices_that_its_lock_was_taken(storage: Storage) -> None:
    with Lock(storage, PATH, "first", heartbeat_s=0.02) as held:
        beats = f"{PATH}/{LOCK}-{held.holder.token}.beat"
        deadline = time.monotonic() + 10
        while not (storage.exists(beats) and int(storage.read_bytes(beats) or b"0") >= 2):
            assert time.monotonic() < deadline, "no heartbeat"
        leave(storage, elsewhere("thief"))
        with pytest.raises(StorageError, match="no longer ours but run 'thief'"):
            held.check()
    assert storage.list(PATH) == [LOCK], "another's lock is not released"


def test_a_crash_during_a_takeover_does_not_lock_everybody_out(storage: Storage) -> None:
    stale, claimant = elsewhere(), replace(LockHolder.here("crashed"), started="1")
    leave(storage, stale)
    storage.write_json(f"{PATH}/{LOCK}-{stale.token}.claim", asdict(claimant))
    with Lock(storage, PATH, "second", stale_s=0.1):
        pass
    assert storage.list(PATH) == []


def test_a_slow_rival_does_not_delete_the_lock_that_a_faster_one_made(storage: Storage) -> None:
    dead = replace(LockHolder.here("dead"), started="1")
    slow = Lock(storage, PATH, "slow")
    with Lock(storage, PATH, "fast") as held:
        slow._take_over(dead)
        held.check()


def test_of_many_rivals_for_a_dead_lock_one_at_a_time_gets_in(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    leave(storage, replace(LockHolder.here("dead"), started="1"))
    inside: list[int] = []
    most: list[int] = []

    def rival(number: int) -> None:
        with Lock(storage, PATH, f"rival{number}", on_wait=lambda text: None):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.02)
            inside.remove(number)

    threads = [threading.Thread(target=rival, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1] * 6
