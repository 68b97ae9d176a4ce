"""Real processes, real signals: whatever dies, and wherever, resuming gives the digest of an undisturbed run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import TINY, run_tiny, run_with_fault, tiny

from fedtailor.core.faults import POINTS
from fedtailor.storage.digest import digest
from fedtailor.storage.files import Storage

CHAOS = ("methods=[fedp2eft]", "base.rounds=3", "strategy.rounds=2", "engine.keep_rounds=1")


def command(*words: str, storage: Path, fault: str | None = None) -> subprocess.Popen[str]:
    env = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    env.pop("FEDTAILOR_FAULT", None)
    if fault:
        env["FEDTAILOR_FAULT"] = fault
    return subprocess.Popen(
        [sys.executable, "-m", "fedtailor", *words],
        env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=storage,
    )  # fmt: skip


def start(storage: Path, fault: str | None = None, *more: str) -> subprocess.Popen[str]:
    overrides = [*TINY, *CHAOS, f"storage={storage}", *more]
    return command("run", *overrides, "--run-id", "run", storage=storage, fault=fault)


def finish(process: subprocess.Popen[str], expected: int) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == expected, out
    return out


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = run_tiny(tiny(tmp_path_factory.mktemp("clean"), *CHAOS))
    return digest(run.storage, run.run_id)


# Every point in the base stage's second round, then every commit point in the personalising stage's second chunk:
# five rounds come before it, with two objects each.
CHUNK_HITS = {name: 7 for name in POINTS if name.startswith("commit:")} | {"commit:object-written": 13}
MOMENTS = [(name, 2) for name in POINTS] + list(CHUNK_HITS.items())


def in_process(storage: Path, fault: str | None) -> int:
    """Exit code of the tiny experiment in a process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny", "fedtailor.worker.worker", "fedtailor.experiment.execute"])
    process = context.Process(target=run_with_fault, args=(storage, CHAOS, fault))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


@pytest.mark.parametrize(("name", "hit"), MOMENTS)
def test_driver_killed_at_any_point_of_the_commit_protocol(clean: str, tmp_path: Path, name: str, hit: int) -> None:
    assert in_process(tmp_path, f"{name}@{hit}") == -signal.SIGKILL
    assert in_process(tmp_path, None) == 0
    assert digest(Storage(str(tmp_path)), "run") == clean


def test_a_full_disk_ends_the_run_with_the_last_commit_intact(clean: str, tmp_path: Path) -> None:
    out = finish(start(tmp_path, "enospc:commit:object-written@3"), 5)
    assert "no space left" in out, out
    assert "Traceback" not in out
    finish(command("resume", "run", "--storage", str(tmp_path), storage=tmp_path), 0)
    assert digest(Storage(str(tmp_path)), "run") == clean


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_in_order_and_says_how_to_resume(
    clean: str, tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    process = start(tmp_path, None, "base.rounds=3")
    wait_for(lambda: list(tmp_path.glob("artifacts/base-*/rounds/*/COMMIT.json")), process)
    process.send_signal(sent)
    began = time.monotonic()
    out = finish(process, code)
    assert time.monotonic() - began < 30
    assert "fedtailor resume run" in out
    finish(command("resume", "run", "--storage", str(tmp_path), storage=tmp_path), 0)
    assert digest(Storage(str(tmp_path)), "run") == clean


def test_the_ray_driver_killed_with_its_actors_resumes(clean: str, tmp_path: Path) -> None:
    """The driver actor dies at a commit of the strategy stage; the command ends non-zero and resumes."""
    process = start(tmp_path, "commit:after-record@5", "engine.backend=ray", "engine.actors=2")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 6, out
    assert "fedtailor resume run" in out
    finish(command("resume", "run", "--storage", str(tmp_path), storage=tmp_path), 0)
    assert digest(Storage(str(tmp_path)), "run") == clean


def wait_for(condition: object, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
