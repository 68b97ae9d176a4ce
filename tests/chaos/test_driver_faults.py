"""Faults of the driver's process, its storage and its clients' answers: real processes, real exit codes, no Ray."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from inspection import committed, fingerprint, full_digest, open_run
from real_process import Process
from tiny import TINY, run_tiny, tiny

from fedtailor.storage import journal, run_folder
from fedtailor.storage.digest import digest

WORDS = (*TINY, "methods=[base]", "base.rounds=4", "fedavg.adapter=lora", "base.cohort=6", "engine.keep_rounds=1")
LIMIT_S = 300
LONG = partial(pytest.param, marks=pytest.mark.chaos_long)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("clean")
    assert start(folder).wait(LIMIT_S) == 0
    return folder


@pytest.fixture
def folder(clean: Path, tmp_path: Path) -> Path:
    """A storage with the prepared inputs only."""
    for pattern in ("data-*", "model-*", "tokens-*"):
        for part in (clean / "artifacts").glob(pattern):
            shutil.copytree(part, tmp_path / "artifacts" / part.name)
    return tmp_path


def start(folder: Path, fault: str | None = None, *more: str) -> Process:
    return Process(folder, ["run", *WORDS, f"storage={folder}", "--run-id", "run", *more], fault)


def resume(folder: Path) -> int:
    return Process(folder, ["resume", "run", "--storage", str(folder)]).wait(LIMIT_S)


def ends(folder: Path, fault: str | None, code: int, *more: str) -> str:
    process = start(folder, fault, *more)
    assert process.wait(LIMIT_S) == code, process.output()
    assert open_run(folder).status()["state"] == ("complete" if code == 0 else "failed")
    assert "Traceback" not in process.output()
    return process.output()


def test_a_second_start_of_a_run_is_refused_and_the_first_is_unharmed(clean: Path, folder: Path) -> None:
    """F9."""
    first = start(folder, "slow stage=base round=1 seconds=4")
    wait_for(lambda: committed(folder), first)
    second = start(folder)
    assert second.wait(LIMIT_S) != 0
    assert "held by run 'run'" in second.output()
    assert first.wait(LIMIT_S) == 0
    assert full_digest(folder) == full_digest(clean)
    assert open_run(folder).status()["state"] == "complete"


def test_storage_that_turns_read_only_ends_the_run_with_the_last_commit_intact(clean: Path, folder: Path) -> None:
    """F14."""
    out = ends(folder, "erofs:commit:before-record@3", 5)
    assert "make the folder writable" in out
    assert len(committed(folder)) == 2
    assert resume(folder) == 0
    assert full_digest(folder) == full_digest(clean)


@pytest.mark.parametrize("action", ["estale", LONG("eio")])
def test_a_rename_that_fails_in_passing_is_tried_again_without_a_word(clean: Path, folder: Path, action: str) -> None:
    """F14."""
    ends(folder, f"{action}:commit:record-temp@2", 0)
    assert full_digest(folder) == full_digest(clean)


@contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[None]:
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"fills a real disk of 8 MB: run as root where tmpfs can be mounted ({made.stderr.strip()})")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="fills a tmpfs, which only Linux has")
def test_a_disk_that_is_really_full_ends_the_run_and_space_lets_it_go_on(
    clean: Path, folder: Path, tmp_path: Path
) -> None:
    """F13 on a real file system: the disk fills while a round is under way, and is freed again."""
    disk = tmp_path / "disk"
    with small_disk(disk, 8):
        shutil.copytree(folder / "artifacts", disk / "artifacts")
        process = start(disk, "slow stage=base round=2 seconds=3")
        wait_for(lambda: len(committed(disk)) == 2, process)
        ballast = disk / "ballast"
        fill(ballast)
        assert process.wait(LIMIT_S) == 5, process.output()
        before = committed(disk)
        assert len(before) == 2
        assert "no space left" in process.output()
        left = [p for p in disk.glob("artifacts/base-*/rounds/*") if not (p / "COMMIT.json").exists()]
        assert [p for p in left if p.name == "000002" and any(q.stat().st_size for q in p.rglob("*.json"))] == []
        ballast.unlink()
        assert resume(disk) == 0
        after = committed(disk)
        assert {name: after[name] for name in before} == before
        assert full_digest(disk) == full_digest(clean)


def fill(path: Path) -> None:
    """Writes until nothing more goes in."""
    with open(path, "wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


def test_one_client_s_nan_is_left_out_as_if_it_had_been_absent(clean: Path, folder: Path, tmp_path: Path) -> None:
    """F15."""
    ends(folder, "nan stage=base round=1 segment=0 client=#1", 0)
    other = tmp_path / "absent"
    shutil.copytree(folder / "artifacts", other / "artifacts", ignore=shutil.ignore_patterns("base-*", "personalise-*"))
    ends(other, "absent stage=base round=1 segment=0 client=#1", 0)
    assert fingerprint(folder) == fingerprint(other) != fingerprint(clean)
    frame = open_run(folder).metrics()
    rejected = frame[frame.metric == "rejected_clients"]
    assert [(row["round"], row["value"], row["method"]) for _, row in rejected.iterrows()] == [(1, 1.0, "fedavg")]
    [failure] = open_run(folder).failures.entries()
    assert (failure["kind"], failure["round"]) == ("rejected", 1)
    assert "rejected_clients" not in set(open_run(other).metrics().metric)


@pytest.mark.parametrize("kind", ["nan", LONG("inf")])
def test_a_round_in_which_all_are_nan_is_not_committed_and_the_last_one_is_kept(
    clean: Path, folder: Path, kind: str
) -> None:
    """F16."""
    out = ends(folder, f"{kind} stage=base round=2", 6)
    assert "0 of 6 updates are valid" in out
    kept = committed(folder)
    assert sorted(kept) == ["base/seed42/0", "base/seed42/1"]
    assert resume(folder) == 0
    assert full_digest(folder) == full_digest(clean)


@pytest.mark.parametrize(("kind", "told"), [("shape", "partial.total is float64"), LONG("rows-twice", "occurs twice")])
def test_an_answer_that_is_not_what_was_asked_for_ends_the_run_by_name_or_is_dropped(
    clean: Path, folder: Path, tmp_path: Path, kind: str, told: str
) -> None:
    """F17."""
    out = " ".join(ends(folder, f"{kind} stage=base round=1 segment=2", 6).split())
    assert "segment 2 is refused" in out
    assert told in out
    assert sorted(committed(folder)) == ["base/seed42/0"]
    assert resume(folder) == 0
    assert full_digest(folder) == full_digest(clean)


def test_with_drop_a_bad_answer_costs_its_clients_that_round_and_below_the_quorum_the_run(folder: Path) -> None:
    """F17."""
    ends(folder, "shape stage=base round=1 segment=2", 0, "engine.on_client_failure=drop")
    frame = open_run(folder).metrics()
    rows = frame[(frame.stage == "base") & (frame.metric == "train_loss")].groupby("round").size()
    assert list(rows) == [6, 4, 6, 6]
    assert [failure["round"] for failure in open_run(folder).failures.entries()] == [1, 1]
    shutil.rmtree(folder / "run")
    for made in (folder / "artifacts").glob("base-*"):
        shutil.rmtree(made)
    faults = "missing stage=base round=1 segment=1; missing stage=base round=1 segment=2"
    out = ends(folder, faults, 6, "engine.on_client_failure=drop")
    assert "2 of 6 updates are valid, 3 needed" in " ".join(out.split())


def test_a_fault_plan_that_cannot_be_read_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    process = start(tmp_path, "explode")
    assert process.wait(LIMIT_S) == 2
    assert "'explode' is no kind of fault" in process.output()
    assert not (tmp_path / "run").exists()


def test_a_clock_that_jumps_changes_neither_order_nor_result(
    clean: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F32."""
    from itertools import count

    steps = count()
    jumps = [1e9, 4e9, 0.0, 2e9]
    monkeypatch.setattr(time, "time", lambda: jumps[next(steps) % 4])
    stamps = (f"20{90 - next(steps) % 60:02d}-01-01T00:00:00.000+00:00" for _ in count())
    for module in (run_folder, journal):
        monkeypatch.setattr(module, "utc_now", lambda: next(stamps))
    run = run_tiny(tiny(folder, *WORDS[len(TINY) :]))
    assert digest(run.storage, run.run_id) == full_digest(clean)
    rounds = [e["round"] for e in run.events.entries() if e.get("kind") == "round"] or list(range(4))
    assert rounds == sorted(rounds)
    assert run.metrics("base")["round"].is_monotonic_increasing


def wait_for(condition: Callable[[], object], process: Process) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.running(), process.output()
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.05)
