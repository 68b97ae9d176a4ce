"""Real processes, real signals: whatever dies, and wherever, resuming gives the digest of an undisturbed run."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from real_process import Process
from tiny import FORKED, TINY, run_tiny, run_with_fault, tiny

from fedtailor.core.faults import POINTS
from fedtailor.storage.digest import digest
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder

LIMIT_S = 240
CHAOS = ("methods=[fedp2eft]", "budgets=[1]", "base.rounds=3", "strategy.rounds=2", "personalise.pools=[unseen]",
         "engine.keep_rounds=1")  # fmt: skip


def words(storage: Path, *more: str) -> list[str]:
    return ["run", *TINY, *CHAOS, f"storage={storage}", "--run-id", "run", *more]


def resume(storage: Path) -> list[str]:
    return ["resume", "run", "--storage", str(storage)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_tiny(tiny(tmp_path_factory.mktemp("clean"), *CHAOS))


@pytest.fixture(scope="module")
def clean(undisturbed: RunFolder) -> str:
    return digest(undisturbed.storage, undisturbed.run_id)


@pytest.fixture
def prepared(undisturbed: RunFolder, tmp_path: Path) -> Path:
    """A storage with the prepared inputs only: what is broken comes after them."""
    for pattern in ("data-*", "model-*", "tokens-*"):
        for part in Path(undisturbed.storage.url, "artifacts").glob(pattern):
            shutil.copytree(part, tmp_path / "artifacts" / part.name)
    return tmp_path


# Every point in the base stage's second round, then every commit point in the personalising stage's second chunk:
# five rounds come before it, with two objects each.
CHUNK_HITS = {name: 7 for name in POINTS if name.startswith("commit:")} | {"commit:object-written": 13}
MOMENTS = [(name, 2) for name in POINTS] + list(CHUNK_HITS.items())


def in_process(storage: Path, fault: str | None) -> int:
    """Exit code of the tiny experiment in a process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(FORKED)
    process = context.Process(target=run_with_fault, args=(storage, CHAOS, fault))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


@pytest.mark.parametrize(("name", "hit"), MOMENTS)
def test_driver_killed_at_any_point_of_the_commit_protocol(clean: str, prepared: Path, name: str, hit: int) -> None:
    assert in_process(prepared, f"{name}@{hit}") == -signal.SIGKILL
    assert in_process(prepared, None) == 0
    assert digest(Storage(str(prepared)), "run") == clean


def test_a_full_disk_ends_the_run_with_the_last_commit_intact(clean: str, prepared: Path) -> None:
    process = Process(prepared, words(prepared), "enospc:commit:object-written@3")
    assert process.wait(LIMIT_S) == 5, process.output()
    assert "no space left" in process.output()
    assert "Traceback" not in process.output()
    assert Process(prepared, resume(prepared)).wait(LIMIT_S) == 0
    assert digest(Storage(str(prepared)), "run") == clean


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_in_order_and_says_how_to_resume(
    clean: str, prepared: Path, sent: signal.Signals, code: int
) -> None:
    process = Process(prepared, words(prepared))
    wait_for(lambda: list(prepared.glob("artifacts/base-*/rounds/*/COMMIT.json")), process)
    os.kill(process.pid, sent)
    assert process.wait(30) == code, process.output()
    assert "fedtailor resume run" in process.output()
    assert Process(prepared, resume(prepared)).wait(LIMIT_S) == 0
    assert digest(Storage(str(prepared)), "run") == clean


def wait_for(condition: Callable[[], object], process: Process) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.running(), process.output()
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.02)
