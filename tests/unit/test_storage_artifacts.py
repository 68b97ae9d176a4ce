"""Folders of a storage on a node: fetched once, whole or not at all, never other bytes than were published."""

from __future__ import annotations

import errno
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bucket_store import BucketFileSystem, reads

from fedtailor.core.errors import StorageError
from fedtailor.storage import backends
from fedtailor.storage.artifacts import MANIFEST, Artifacts, cache_folder, fetch, publish, published, read_manifest
from fedtailor.storage.files import MissingFileError, Storage
from fedtailor.storage.lock import Lock

PATH = "artifacts/model-1"
CONTENT = {"config.json": b"{}", "weights/part-1.bin": b"one" * 1000, "weights/part-2.bin": b"two" * 1000}
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BUCKET_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(backends, "PAUSES", (0.0, 0.0, 0.0))
    yield tmp_path / "log"
    BucketFileSystem.refused.clear()
    BucketFileSystem.lost.clear()


@pytest.fixture
def store(tmp_path: Path, log: Path) -> Storage:
    return Storage(f"bucket://{tmp_path}/bucket")


def fill(folder: Path) -> None:
    for name, data in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture
def model(store: Storage, tmp_path: Path) -> Path:
    """Where the store keeps a published folder."""
    fill(tmp_path / "made")
    publish(store, PATH, tmp_path / "made")
    return tmp_path / "bucket" / PATH


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def start(action: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    process = FORK.Process(target=action)
    process.start()
    return process


def test_a_folder_of_a_local_storage_is_used_where_it_is(tmp_path: Path, log: Path) -> None:
    fill(tmp_path / "runs" / PATH)
    assert fetch(Storage(tmp_path / "runs"), PATH) == tmp_path / "runs" / PATH
    assert not (tmp_path / "cache").exists()


def test_a_local_storage_that_is_not_on_this_node_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"is not on .*folder that they share, or an object store"):
        fetch(Storage(tmp_path / "elsewhere"), PATH)


def test_the_copy_has_the_published_files_and_nothing_else(store: Storage, model: Path) -> None:
    assert content(fetch(store, PATH)) == CONTENT


def test_a_second_fetch_reads_the_manifest_only(store: Storage, model: Path, log: Path) -> None:
    fetch(store, PATH)
    log.unlink()
    fetch(Storage(store.url), PATH)
    assert reads(log) == [MANIFEST]


def test_of_several_processes_of_a_node_one_downloads(store: Storage, model: Path, log: Path) -> None:
    processes = [start(lambda: fetch(Storage(store.url), PATH)) for _ in range(4)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(name for name in reads(log) if name != MANIFEST) == ["config.json", "part-1.bin", "part-2.bin"]
    assert content(fetch(store, PATH)) == CONTENT


def test_a_process_killed_in_the_middle_leaves_nothing_to_be_used(
    store: Storage, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as armed:
        armed.setenv("BUCKET_KILL", "part-2.bin")
        process = start(lambda: fetch(store, PATH))
        process.join(30)
    assert process.exitcode == -signal.SIGKILL
    target = cache_folder(store) / PATH
    assert not target.exists()
    assert len(list(target.parent.glob(".*.new"))) == 1
    assert content(fetch(store, PATH)) == CONTENT
    assert list(target.parent.glob(".*.new")) == []


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "added"])
def test_a_damaged_copy_is_fetched_again(store: Storage, model: Path, damage: str) -> None:
    part = fetch(store, PATH) / "weights/part-1.bin"
    {
        "changed": lambda: part.write_bytes(b"ONE" * 1000),
        "cut": lambda: part.write_bytes(b"one" * 999),
        "gone": part.unlink,
        "added": lambda: part.with_name("adapter.json").write_bytes(b"{}"),
    }[damage]()
    assert content(fetch(store, PATH)) == CONTENT


def test_a_file_that_is_damaged_at_its_source_is_named_and_not_kept(store: Storage, model: Path, log: Path) -> None:
    (model / "weights/part-2.bin").write_bytes(b"TWO" * 1000)
    with pytest.raises(StorageError, match=r"weights/part-2\.bin has sha256 .* its manifest says"):
        fetch(store, PATH)
    assert reads(log).count("part-2.bin") == 2
    assert not (cache_folder(store) / PATH).exists()


def test_a_folder_counts_once_its_manifest_is_there(store: Storage, model: Path) -> None:
    (model / MANIFEST).unlink()
    assert not published(store, PATH)
    with pytest.raises(MissingFileError, match=r"FILES\.json"):
        fetch(store, PATH)


def test_a_folder_that_is_published_anew_replaces_the_copy(store: Storage, model: Path, tmp_path: Path) -> None:
    fetch(store, PATH)
    (tmp_path / "made" / "config.json").write_bytes(b"[]")
    publish(store, PATH, tmp_path / "made")
    assert content(fetch(store, PATH)) == {**CONTENT, "config.json": b"[]"}


@pytest.mark.parametrize("name", ["../../outside", "/etc/outside", "a\\\\b"])
def test_a_manifest_cannot_write_outside_of_the_cache(store: Storage, model: Path, name: str) -> None:
    (model / MANIFEST).write_text(f'{{"files": {{"{name}": "00"}}}}')
    with pytest.raises(StorageError, match="unsafe file name"):
        fetch(store, PATH)


def test_a_cache_that_cannot_be_written_is_named(
    store: Storage, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"filling the node's cache .*FEDTAILOR_CACHE"):
        fetch(store, PATH)


def test_an_artifact_is_made_once_for_all_nodes(
    store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made-by"

    def make(out: Path) -> None:
        with made.open("a") as file:
            file.write("x")
        fill(out)

    def node(number: int) -> None:
        monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / f"cache-{number}"))
        assert content(Artifacts(store, f"run-{number}").ensure("model-1", make)) == CONTENT

    processes = [start(lambda number=number: node(number)) for number in range(3)]  # type: ignore[misc]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 3
    assert made.read_text() == "x"
    assert set(store.list(PATH)) == {"config.json", "weights", MANIFEST}


def test_an_artifact_whose_making_fails_is_not_there(store: Storage, log: Path) -> None:
    def fail(out: Path) -> None:
        fill(out)
        raise KeyError

    artifacts = Artifacts(store, "run")
    with pytest.raises(KeyError):
        artifacts.ensure("model-1", fail)
    assert not published(store, PATH)
    assert list(artifacts.folder.glob("model-1")) == []
    assert content(artifacts.ensure("model-1", fill)) == CONTENT


def test_an_upload_that_was_cut_off_is_made_again(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = Artifacts(store, "run")
    with monkeypatch.context() as broken:
        broken.setattr(store, "write_json", lambda *_: (_ for _ in ()).throw(StorageError("cut off")))
        with pytest.raises(StorageError, match="cut off"):
            artifacts.ensure("model-1", fill)
    assert "config.json" in store.list(PATH)
    assert not published(store, PATH)
    assert content(artifacts.ensure("model-1", fill)) == CONTENT


class LibraryError(Exception):
    """As botocore's and aiohttp's, no OSError."""


PASSING = [TimeoutError("slow"), ConnectionResetError("reset"), OSError(errno.EIO, "I/O"), LibraryError("502")]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_a_passing_failure_of_the_store_is_outlasted(store: Storage, model: Path, error: Exception) -> None:
    for action in (
        lambda: store.write_bytes("a", b"1"),
        lambda: store.read_bytes("a"),
        lambda: store.exists("a"),
        lambda: store.list(""),
        lambda: store.append("a", "2"),
        lambda: store.move("a", "b"),
        lambda: store.read_bytes("b"),
        lambda: store.delete("b"),
        lambda: store.create("c", b"1"),
        lambda: fetch(store, PATH),
    ):
        BucketFileSystem.refused.extend([error] * 2)
        action()
        assert not BucketFileSystem.refused
    assert store.list("") == ["artifacts", "c"]


def test_a_folder_whose_listing_fails_in_passing_is_moved_whole(store: Storage, model: Path) -> None:
    BucketFileSystem.refused.extend([TimeoutError("slow")] * 2)
    store.move(PATH, "artifacts/other")
    assert not store.exists(PATH)
    assert content(model.parent / "other").items() >= CONTENT.items()


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_a_store_that_stays_away_ends_in_a_message(store: Storage, error: Exception) -> None:
    BucketFileSystem.refused.extend([error] * 50)
    with pytest.raises(StorageError, match=r"reading .*bucket/a: \w+Error"):
        store.read_bytes("a")
    assert len(BucketFileSystem.refused) == 46


def test_a_read_only_store_is_not_tried_again(store: Storage) -> None:
    BucketFileSystem.refused.extend([OSError(errno.EROFS, "read-only")] * 2)
    with pytest.raises(StorageError, match="not allowed"):
        store.write_bytes("a", b"1")
    assert len(BucketFileSystem.refused) == 1


def test_a_lock_whose_answer_was_lost_is_still_ours(store: Storage) -> None:
    BucketFileSystem.lost.append(TimeoutError("no answer"))
    with Lock(store, PATH, "first") as held:
        held.check()
        with pytest.raises(StorageError, match="is held by run 'first'"):
            Lock(store, PATH, "second").__enter__()
    assert store.list(PATH) == []


def test_a_store_that_ignores_conditions_cannot_hold_a_lock(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = BucketFileSystem.pipe_file

    def careless(self: BucketFileSystem, path: str, value: bytes, mode: str = "overwrite") -> None:
        honest(self, path, value)

    monkeypatch.setattr(BucketFileSystem, "pipe_file", careless)
    with pytest.raises(StorageError, match="ignores exclusive writes"), Lock(store, PATH, "first"):
        pass


def test_the_manifest_lists_every_file_with_its_hash(store: Storage, model: Path) -> None:
    files = read_manifest(store, PATH)
    assert sorted(files) == sorted(CONTENT)
    assert all(len(value) == 64 for value in files.values())
