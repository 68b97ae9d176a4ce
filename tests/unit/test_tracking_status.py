"""The status of a run is the truth for anybody who asks, also when its process cannot tell any more."""

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
from typer.testing import CliRunner

from fedtailor.cli import app, status_views
from fedtailor.storage.files import Storage
from fedtailor.storage.lock import LOCK, STALE_S, Lock, LockHolder
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tracking.status import SILENT_S, state_of, status_of

CONFIG: dict[str, Any] = {"seeds": [1]}
ELSEWHERE = {"host": "far-away", "machine": "another boot/1", "pid": 1}
KEYS = ("base/seed1", "personalise/lora/seed1")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder.create(Storage(tmp_path), "r1", CONFIG)
    run.set_stages(
        [{"key": key, "kind": key.split("/")[0], "method": "m", "seed": 1, "artifact": key.replace("/", "-"),
          "rounds": rounds} for key, rounds in zip(KEYS, (4, 0), strict=True)]
    )  # fmt: skip
    return run


@pytest.fixture(scope="module")
def gone() -> LockHolder:
    """The owner of a lock whose process is no more."""
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return replace(LockHolder.here("r1"), pid=process.pid, started="1")


def leave(run: RunFolder, owner: LockHolder) -> Path:
    """A lock and its heartbeat, as a process leaves them that had no time to release it."""
    run.storage.write_json(f"{run.run_id}/{LOCK}", asdict(owner))
    beat = f"{run.run_id}/{LOCK}-{owner.token}.beat"
    run.storage.write_bytes(beat, b"7")
    return run.storage.local_path(beat)


def cli(*words: str) -> tuple[int, str]:
    answer = CliRunner().invoke(app, ["status", *words])
    return answer.exit_code, answer.output


def test_a_run_whose_process_holds_the_lock_is_running_and_says_who(run: RunFolder) -> None:
    run.set_status("running")
    with Lock(run.storage, run.run_id, run.run_id):
        state = state_of(run)
    assert state.state == "running"
    assert state.holder is not None
    assert (state.holder["pid"], state.holder["present"]) == (os.getpid(), True)
    assert 0 <= state.holder["silent_s"] < 60


def test_a_process_that_was_killed_leaves_a_dead_run(run: RunFolder) -> None:
    program = (
        "import os, signal, sys\n"
        "from fedtailor.storage.lock import Lock\n"
        "from fedtailor.storage.run_folder import RunFolder\n"
        "from fedtailor.storage.files import Storage\n"
        "run = RunFolder.open(Storage(sys.argv[1]), 'r1')\n"
        "with Lock(run.storage, 'r1', 'r1'):\n"
        "    run.set_status('running')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run([sys.executable, "-c", program, run.storage.url], check=False)
    assert process.returncode == -signal.SIGKILL
    state = state_of(run)
    assert run.status()["state"] == "running", "nobody was left to say otherwise"
    assert state.state == "dead"
    assert "stopped without a word: process" in state.message
    assert "fedtailor resume r1" in state.message


def test_a_run_of_another_machine_is_dead_when_its_heartbeat_stands_still(run: RunFolder) -> None:
    beat = leave(run, replace(LockHolder.here("r1"), **ELSEWHERE))
    assert state_of(run).state == "running"
    long_ago = time.time() - 2 * STALE_S
    for file in (beat, beat.parent / LOCK):
        os.utime(file, (long_ago, long_ago))
    assert state_of(run).state == "dead"


def test_before_it_has_the_lock_a_run_lives_as_long_as_the_command_that_started_it(
    run: RunFolder, gone: LockHolder
) -> None:
    run.set_status("running", "", {"launcher": asdict(LockHolder.here("r1"))})
    assert state_of(run).state == "running"
    run.set_status("running", "", {"launcher": asdict(gone)})
    assert state_of(run).state == "dead"


def test_a_running_state_that_nobody_stands_for_gets_old(run: RunFolder) -> None:
    assert state_of(run).state == "running"
    status = run.status()
    run.storage.write_json("r1/status.json", {**status, "updated": "2020-01-01T00:00:00+00:00"})
    assert state_of(run).state == "dead"
    assert SILENT_S >= 60


@pytest.mark.parametrize("state", ["complete", "failed", "interrupted"])
def test_an_ended_run_is_never_dead(run: RunFolder, gone: LockHolder, state: Any) -> None:
    leave(run, gone)
    run.set_status(state, "why")
    assert (state_of(run).state, state_of(run).message) == (state, "why")


def test_losses_retries_rejections_speed_and_disk_are_told(run: RunFolder) -> None:
    run.set_status("running", "", {"launcher": asdict(LockHolder.here("r1"))})
    lost = {"actor": 0, "cause": "c", "host": "h", "node": "", "during": "run", "stack": ""}
    for how in ("death", "oom", "death"):
        run.events.append({"kind": "pool", "event": "actor_lost", "how": how, **lost})
    run.events.append({"kind": "pool", "event": "job_retried", "how": "", "stage": KEYS[0], "round": 0, "segment": 3,
               "attempt": 1, "reason": "oom"})  # fmt: skip
    run.failures.append({"client": "a", "stage": KEYS[0], "round": 0, "kind": "rejected", "reason": "NaN"})
    run.set_progress({"stage": KEYS[0], "clients_per_second": 2.5, "seconds_left": 90.0})
    run.storage.write_bytes("artifacts/base-seed1/blob", bytes(5000))
    found = status_of(run)
    assert (found.retries, found.losses, found.rejected) == (1, {"death": 2, "oom": 1}, {"rejected": 1})
    assert (found.stage, found.clients_per_second, found.seconds_left) == (KEYS[0], 2.5, 90.0)
    assert [(stage["key"], stage["committed"], stage["total"]) for stage in found.stages] == [
        (KEYS[0], 0, 4),
        (KEYS[1], 0, 0),
    ]
    assert found.disk_bytes > 5000
    assert found.last_event is not None
    assert found.last_event["text"] == f"{KEYS[0]}, round 0: segment 3 goes out again (attempt 1) after: oom"
    code, text = cli("r1", "--storage", run.storage.url)
    assert code == 0
    for part in ("base/seed1: 2.5 clients/s, ETA 0:01:30", "segments retried: 1, actors lost: 2 death, 1 oom", "0/4"):
        assert part in text, text


def test_the_speed_of_a_run_that_does_not_run_is_not_told(run: RunFolder, gone: LockHolder) -> None:
    run.set_progress({"stage": KEYS[0], "clients_per_second": 2.5, "seconds_left": 90.0})
    leave(run, gone)
    assert status_of(run).clients_per_second is None


def test_machines_get_json(run: RunFolder) -> None:
    run.set_status("complete")
    code, text = cli("r1", "--storage", run.storage.url, "--json")
    assert code == 0
    assert json.loads(text) == json.loads(json.dumps(asdict(status_of(run))))
    code, text = cli("--storage", run.storage.url, "--json")
    assert [(entry["run"], entry["state"]) for entry in json.loads(text)] == [("r1", "complete")]


def test_without_a_run_all_runs_are_listed_with_their_state(run: RunFolder, gone: LockHolder) -> None:
    leave(run, gone)
    RunFolder.create(run.storage, "r2", CONFIG).set_status("failed", "first line\nsecond line")
    code, text = cli("--storage", run.storage.url)
    assert code == 0
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "dead" in rows["r1"]
    assert "first line" in rows["r2"]
    assert "second line" not in text
    assert cli("--storage", f"{run.storage.url}/nothing")[1].startswith("no runs")


@pytest.mark.parametrize(("state", "code"), [("complete", 0), ("failed", 1), ("interrupted", 130)])
def test_watching_ends_with_the_run_and_with_its_exit_code(run: RunFolder, state: Any, code: int) -> None:
    run.set_status(state)
    found, text = cli("r1", "--storage", run.storage.url, "--watch")
    assert found == code
    assert state in text


def test_watching_goes_on_until_the_run_ends(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_views, "REFRESH_S", 0.01)
    run.set_status("running", "", {"launcher": asdict(LockHolder.here("r1"))})
    threading.Timer(0.3, lambda: run.set_status("complete")).start()
    code, text = cli("r1", "--storage", run.storage.url, "--watch", "--json")
    states = [json.loads(line)["state"] for line in text.splitlines()]
    assert code == 0
    assert states[0] == "running"
    assert states[-1] == "complete"


def test_watching_needs_a_run(run: RunFolder) -> None:
    code, _ = cli("--watch", "--storage", run.storage.url)
    assert code == 2
