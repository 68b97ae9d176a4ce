"""The commit protocol: a round exists wholly or not at all, whatever happens while it is written or later."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pytest

from fedtailor.core import faults
from fedtailor.core.errors import ConfigError, StorageError
from fedtailor.storage import backends, payloads
from fedtailor.storage.commit import RECORD, DamagedError, compose, folder, load, seal
from fedtailor.storage.commit_log import CommitLog
from fedtailor.storage.digest import commits_digest
from fedtailor.storage.files import Storage, safe_path

PATH = "artifacts/base-0123"
HEAVY = ("global/", "server/")
PLATFORM = Path(__file__).parents[2] / "platform"


def objects(index: int) -> dict[str, payloads.Payload]:
    """Different in every round, so that no two files can stand in for each other."""
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4) + index
    return {
        "global/shared": {"a": numbers, "scalar": np.float32(index)},
        "server/state": {"momentum": -numbers.astype(np.float64)},
        "clients/private": {"seen/amh/00": numbers.T, "seen/amh/01": np.zeros(0, np.float32)},
        "metrics": pa.table({"client": ["x", "y"], "value": [0.5 + index, 1.5]}),
        "adapters/r2/seen/amh/00/adapter_config.json": b'{"r": %d}' % (index + 1),
    }


def record(index: int) -> dict[str, object]:
    return {"cohort": ["x", "y"], "weights": {"x": 3, "y": 4.5}, "round": index}


def filled(storage: Storage, count: int) -> CommitLog:
    log = CommitLog(storage, PATH)
    for index in range(count):
        log.commit(index, objects(index), record(index))
    return log


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "local":
        yield Storage(tmp_path)
        return
    found = Storage(f"memory://{tmp_path.name}")
    yield found
    found.delete(PATH)


def test_a_commit_gives_back_what_was_put_in(storage: Storage) -> None:
    log = filled(storage, 2)
    found = log.newest()
    assert found is not None
    assert (found.index, dict(found.record), found.complete) == (1, record(1), True)
    assert list(found.objects) == sorted(
        [
            "adapters/r2/seen/amh/00/adapter_config.json",
            "clients/private.safetensors",
            "global/shared.safetensors",
            "metrics.parquet",
            "server/state.safetensors",
        ]
    )
    shared = found.tensors("global/shared.safetensors")
    assert shared["scalar"].shape == ()
    np.testing.assert_array_equal(shared["a"], np.arange(12, dtype=np.float32).reshape(3, 4) + 1)
    transposed = found.tensors("clients/private.safetensors")["seen/amh/00"]
    np.testing.assert_array_equal(transposed, shared["a"].T)
    assert found.table("metrics.parquet").to_pylist()[0] == {"client": "x", "value": 1.5}
    assert found.bytes("adapters/r2/seen/amh/00/adapter_config.json") == b'{"r": 2}'
    assert storage.read_bytes(f"{PATH}/LATEST") == b"1\n"


def test_an_empty_log_has_no_newest_round(storage: Storage) -> None:
    log = CommitLog(storage, PATH)
    assert log.newest() is None
    assert log.all() == []
    assert log.damage() is None


def test_commits_are_chained_by_hash(storage: Storage) -> None:
    commits = filled(storage, 3).all()
    assert [c.previous for c in commits] == [None, commits[0].sha256, commits[1].sha256]
    on_disk = storage.read_bytes(f"{PATH}/{folder(0)}/{RECORD}")
    assert payloads.sha256(on_disk) == commits[0].sha256


def test_rounds_are_committed_once_and_in_order(storage: Storage) -> None:
    log = filled(storage, 2)
    with pytest.raises(StorageError, match="already committed"):
        log.commit(1, objects(1), record(1))
    with pytest.raises(StorageError, match=r"rounds/000002/COMMIT.json is missing"):
        log.commit(3, objects(3), record(3))
    assert [c.index for c in log.all()] == [0, 1]


def test_equal_rounds_have_equal_values_and_files_but_no_common_paths(tmp_path: Path) -> None:
    one, two = (filled(Storage(tmp_path / name), 1).read(0) for name in ("one", "two"))
    assert {n: (o.content, o.sha256) for n, o in one.objects.items()} == {
        n: (o.content, o.sha256) for n, o in two.objects.items()
    }
    assert not {o.path for o in one.objects.values()} & {o.path for o in two.objects.values()}
    assert commits_digest([one]) == commits_digest([two])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_not_committed(storage: Storage, bad: float) -> None:
    log = filled(storage, 1)
    wrong = {"global/shared": {"fine": np.ones(3), "broken": np.array([1.0, bad])}}
    with pytest.raises(StorageError, match="'broken' has values that are not finite"):
        log.commit(1, wrong, {})
    as_file = {"adapters/a.safetensors": payloads.encode("x", {"broken": np.array([bad], np.float32)})[1]}
    with pytest.raises(StorageError, match="'broken' has values that are not finite"):
        log.commit(1, as_file, {})
    assert storage.list(f"{PATH}/rounds") == ["000000"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"../out": b"x"}, "unsafe file name"),
        ({"/out": b"x"}, "unsafe file name"),
        ({"a/../../out": b"x"}, "unsafe file name"),
        ({"a": np.zeros(1)}, "not ndarray"),
        ({"a": {"b": np.array(["text"])}}, "has dtype"),
        ({"a": {"b": np.zeros(1)}, "a.safetensors": {"b": np.zeros(1)}}, "named 'a.safetensors'"),
        ({"a.safetensors": b"garbage!garbage"}, "safetensors"),
        ({"a.parquet": b"garbage"}, "Parquet"),
    ],
)
def test_what_cannot_be_kept_is_refused_whole(
    storage: Storage, wrong: dict[str, payloads.Payload], message: str
) -> None:
    log = filled(storage, 1)
    with pytest.raises(StorageError, match=message):
        log.commit(1, {"fine": b"x", **wrong}, {})
    with pytest.raises(StorageError, match="must be JSON"):
        log.commit(1, {"fine": b"x"}, {"value": float("nan")})
    assert storage.list(f"{PATH}/rounds") == ["000000"]
    assert log.newest() is not None


def test_a_huge_header_is_refused_before_it_is_read() -> None:
    with pytest.raises(StorageError, match="header of 1099511627776 bytes"):
        payloads.read_tensors("x.safetensors", (2**40).to_bytes(8, "little") + b"{}")


@pytest.mark.parametrize("path", ["", "/a", "a//b", "..", "a/../b", "./a", "a/", "a\\b", "a\nb", "a\0"])
def test_paths_that_leave_the_root_are_refused(path: str) -> None:
    with pytest.raises(StorageError, match="unsafe"):
        safe_path(path)


@pytest.mark.parametrize("path", ["../../../etc/passwd", "/etc/passwd", "quarantine/x"])
def test_a_commit_that_names_files_outside_of_the_rounds_is_refused(storage: Storage, path: str) -> None:
    commit = filled(storage, 1).read(0)
    ref = commit.objects["metrics.parquet"]
    forged = compose(0, None, {}, {"metrics.parquet": type(ref)(path, ref.sha256, ref.size, ref.content)})
    storage.write_bytes(f"{PATH}/{folder(0)}/{RECORD}", forged)
    with pytest.raises(DamagedError, match=RECORD):
        load(storage, PATH, 0)


@pytest.mark.parametrize("content", [{}, {"schema": 99}, {"schema": 1, "index": 0, "previous": None}])
def test_a_sealed_file_that_is_no_commit_is_refused(storage: Storage, content: dict[str, object]) -> None:
    filled(storage, 1)
    storage.write_bytes(f"{PATH}/{folder(0)}/{RECORD}", seal(content))
    with pytest.raises(DamagedError, match=RECORD):
        load(storage, PATH, 0)


def _flip(file: Path, rng: Random) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _truncate(file: Path, rng: Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(1, len(data))])


def _extend(file: Path, rng: Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 9)))


def _empty(file: Path, rng: Random) -> None:
    file.write_bytes(b"")


def _remove(file: Path, rng: Random) -> None:
    file.unlink()


def _edit(file: Path, rng: Random) -> None:
    """An edit of COMMIT.json by somebody who knows JSON: another value, another layout, another round's."""
    record_file = next(p for p in file.parents if p.parent.name == "rounds") / RECORD
    content = json.loads(record_file.read_bytes())
    kind = rng.randrange(4)
    if kind == 0:
        content["record"]["weights"]["x"] = rng.random()
    elif kind == 1:
        next(iter(content["objects"].values()))["size"] += 1
    elif kind == 2:
        record_file.write_bytes(json.dumps(content, indent=rng.randrange(3)).encode())
        return
    else:
        record_file.write_bytes((record_file.parents[1] / "000001" / RECORD).read_bytes())
        return
    record_file.write_bytes(payloads.canonical_json(content))


def _swap(file: Path, rng: Random) -> None:
    root = next(p for p in file.parents if p.parent.name == "rounds")
    others = sorted(p for p in root.rglob("*") if p.is_file() and p.read_bytes() != file.read_bytes())
    other = rng.choice(others)
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)


CORRUPTIONS: tuple[Callable[[Path, Random], None], ...] = (
    _flip,
    _truncate,
    _extend,
    _empty,
    _remove,
    _edit,
    _swap,
)


@pytest.mark.parametrize("block", range(4))
def test_two_hundred_corruptions_of_the_newest_round_are_all_detected(tmp_path: Path, block: int) -> None:
    log = filled(Storage(tmp_path), 3)
    kept = {p: p.read_bytes() for p in (tmp_path / PATH).rglob("*") if p.is_file()}
    detected = 0
    for seed in range(50 * block, 50 * (block + 1)):
        rng = Random(seed)
        target = rng.choice(sorted(p for p in kept if "000002" in p.parts))
        CORRUPTIONS[seed % len(CORRUPTIONS)](target, rng)
        log.events.clear()
        assert log.damage() is not None, seed
        found = log.newest()
        assert found is not None
        assert found.index == 1, seed
        np.testing.assert_array_equal(found.tensors("server/state.safetensors")["momentum"].ravel()[:2], [-1, -2])
        assert [event["event"] for event in log.events] == ["quarantined"], seed
        place = Path(log.events[0]["place"])
        assert json.loads((place / "REASON.json").read_text())["reason"] == log.events[0]["reason"]
        assert str(tmp_path) in log.events[0]["reason"], "the reason names the file"
        detected += 1
        for path, data in kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    assert detected == 50
    assert len(list((tmp_path / PATH / "quarantine").iterdir())) == 50


def test_a_round_can_be_committed_again_after_it_was_quarantined(storage: Storage) -> None:
    log = filled(storage, 3)
    before = commits_digest(log.all())
    storage.write_bytes(f"{PATH}/{log.read(2).objects['metrics.parquet'].path}", b"")
    assert [c.index for c in log.all()] == [0, 1]
    newest = log.newest()
    assert newest is not None
    log.commit(newest.index + 1, objects(2), record(2))
    assert commits_digest(log.all()) == before
    assert log.damage() is None


def test_a_damaged_file_is_never_handed_out(storage: Storage) -> None:
    commit = filled(storage, 1).read(0)
    path = f"{PATH}/{commit.objects['global/shared.safetensors'].path}"
    other = payloads.encode("x", {"a": np.ones((3, 4), np.float32), "scalar": np.float32(0)})[1]
    storage.write_bytes(path, other)
    with pytest.raises(DamagedError, match=r"shared\.safetensors is not what was committed"):
        commit.tensors("global/shared.safetensors")


def test_a_damaged_old_round_ends_the_prefix_and_repair_moves_the_rest(storage: Storage) -> None:
    log = filled(storage, 4)
    storage.delete(f"{PATH}/{log.read(1).objects['metrics.parquet'].path}")
    assert [c.index for c in log.all()] == [0]
    assert "metrics.parquet is missing" in str(log.damage())
    assert storage.list(f"{PATH}/rounds") == ["000000", "000001", "000002", "000003"], "readers move nothing"
    assert [c.index for c in log.all(repair=True)] == [0]
    assert storage.list(f"{PATH}/quarantine") == ["000001", "000002", "000003"]
    assert [event["round"] for event in log.events] == [1, 2, 3]


def test_a_changed_history_stops_the_run_and_names_the_file(storage: Storage) -> None:
    log = filled(storage, 4)
    old = log.read(1)
    storage.write_bytes(f"{PATH}/{folder(1)}/{RECORD}", compose(1, old.previous, {"other": 1}, old.objects))
    with pytest.raises(DamagedError, match=r"000002/COMMIT.json does not follow.*move .* away"):
        log.newest()
    assert storage.list(f"{PATH}/quarantine") == []


def test_a_round_that_vanished_is_reported(storage: Storage) -> None:
    log = filled(storage, 3)
    storage.delete(f"{PATH}/{folder(2)}")
    assert "000002/COMMIT.json is missing" in str(log.damage())
    newest = log.newest()
    assert newest is not None
    assert newest.index == 1
    assert [(e["event"], e["round"]) for e in log.events] == [("lost", 2)]
    assert log.damage() is None


def test_pruning_keeps_records_metrics_and_digest(storage: Storage) -> None:
    log = filled(storage, 5)
    before = commits_digest(log.all())
    log.prune(2, HEAVY)
    assert commits_digest(log.all()) == before
    assert [c.complete for c in log.all()] == [False, False, False, True, True]
    old = log.read(0)
    assert not storage.exists(f"{PATH}/{old.objects['global/shared.safetensors'].path}")
    assert old.table("metrics.parquet").num_rows == 2
    assert old.tensors("clients/private.safetensors")
    with pytest.raises(StorageError, match="was pruned"):
        old.tensors("global/shared.safetensors")
    assert log.damage() is None
    log.prune(2, HEAVY)
    CommitLog(storage, PATH).prune(1, HEAVY)
    assert [c.complete for c in log.all()] == [False] * 4 + [True]
    with pytest.raises(StorageError, match="keep must be at least 1"):
        log.prune(0, HEAVY)


def test_a_run_never_goes_on_from_a_pruned_round(storage: Storage) -> None:
    log = filled(storage, 4)
    log.prune(1, HEAVY)
    storage.delete(f"{PATH}/{log.read(3).objects['server/state.safetensors'].path}")
    assert log.newest() is None
    assert len(storage.list(f"{PATH}/quarantine")) == 4
    log.commit(0, objects(0), record(0))
    assert [c.index for c in log.all()] == [0]


def test_an_edited_pruning_note_is_detected(storage: Storage) -> None:
    log = filled(storage, 3)
    log.prune(1, HEAVY)
    note = f"{PATH}/{folder(0)}/PRUNED.json"
    storage.write_bytes(note, storage.read_bytes(note).replace(b"server/", b"metrics"))
    assert log.all() == []
    assert "PRUNED.json" in str(log.damage())


def test_another_rounds_pruning_note_is_detected(storage: Storage) -> None:
    log = filled(storage, 3)
    log.prune(1, HEAVY)
    note = storage.read_bytes(f"{PATH}/{folder(0)}/PRUNED.json")
    storage.write_bytes(f"{PATH}/{folder(2)}/PRUNED.json", note)
    newest = log.newest()
    assert newest is None
    assert "PRUNED.json belongs to another commit" in log.events[-1]["reason"]


def test_temporary_files_of_killed_writers_are_swept(storage: Storage) -> None:
    log = filled(storage, 2)
    left = [f"{PATH}/.LATEST.0123.tmp", f"{PATH}/{folder(1)}/.COMMIT.json.0123.tmp"]
    for path in left:
        storage.write_bytes(path, b"half")
    assert log.newest(repair=False) is not None
    assert all(storage.exists(path) for path in left)
    assert log.newest() is not None
    assert not any(storage.exists(path) for path in left)


def test_a_lost_lock_forbids_the_commit(storage: Storage) -> None:
    def lost() -> None:
        raise StorageError("lock lost")

    filled(storage, 1)
    log = CommitLog(storage, PATH, guard=lost)
    with pytest.raises(StorageError, match="lock lost"):
        log.commit(1, objects(1), record(1))
    assert storage.list(f"{PATH}/rounds") == ["000000"]


def test_of_two_writers_of_a_round_only_one_commits(storage: Storage) -> None:
    filled(storage, 1)
    rival = CommitLog(storage, PATH)
    log = CommitLog(storage, PATH, guard=lambda: None if rival.all()[1:] else _commit_one(rival))
    with pytest.raises(StorageError, match="committed by another process"):
        log.commit(1, objects(7), record(7))
    assert rival.read(1).record["round"] == 1
    assert [c.index for c in rival.all()] == [0, 1], "the loser has touched nothing"


def _commit_one(log: CommitLog) -> None:
    log.commit(1, objects(1), record(1))


# A fork per point keeps the imports out of the time: one interpreter for all of them.
KILLED = f"""
import os, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(PLATFORM)!r}]
from pathlib import Path
from test_storage_commit_log import HEAVY, PATH, CommitLog, Storage, faults, filled, objects, record
root = Path(sys.argv[1])
for point in faults.POINTS:
    place = root / point.replace(":", "-")
    log = filled(Storage(place), 3)
    log.prune(2, HEAVY)
    child = os.fork()
    if child == 0:
        faults._passes.clear()
        os.environ[faults.VARIABLE] = f"{{point}}@1"
        log.commit(3, objects(3), record(3))
        log.prune(2, HEAVY)
        os._exit(0)
    print(point, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    root = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(root)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return root, {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}


@pytest.mark.parametrize("point", faults.POINTS)
def test_a_kill_at_any_point_leaves_the_old_or_the_new_round(
    killed: tuple[Path, dict[str, int]], point: str, tmp_path: Path
) -> None:
    root, codes = killed
    assert codes[point] == -signal.SIGKILL
    log = CommitLog(Storage(root / point.replace(":", "-")), PATH)
    newest = log.newest()
    assert newest is not None
    committed = faults.POINTS.index(point) >= faults.POINTS.index("commit:after-record")
    assert newest.index == (3 if committed else 2)
    np.testing.assert_array_equal(newest.tensors("global/shared.safetensors")["a"].ravel()[0], np.float32(newest.index))
    assert log.storage.list(f"{PATH}/quarantine") == [], "an attempt that never committed is no damage"
    if not committed:
        log.commit(3, objects(3), record(3))
    log.prune(2, HEAVY)
    assert commits_digest(log.all()) == commits_digest(filled(Storage(tmp_path), 4).all())
    assert [c.complete for c in log.all()] == [False, False, True, True]
    files = [p for p in (root / point.replace(":", "-")).rglob("*") if p.is_file()]
    named = {log.storage.full(f"{PATH}/{o.path}") for c in log.all() for o in c.objects.values()}
    extra = [p for p in files if str(p) not in named and p.name not in (RECORD, "PRUNED.json", "LATEST")]
    assert extra == [], "nothing is left of the killed attempt"
    assert sum("global/shared" in str(p) for p in files) == 2, "pruned weights are really gone"


@pytest.mark.parametrize("point", [p for p in faults.POINTS if p.startswith("commit")])
def test_a_full_disk_leaves_the_last_commit_and_a_clear_sentence(
    storage: Storage, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = filled(storage, 2)
    faults._passes.clear()
    monkeypatch.setenv(faults.VARIABLE, f"enospc:{point}@1")
    with pytest.raises(StorageError, match=r"rounds/000002\S*: no space left on the device.*free space and resume"):
        log.commit(2, objects(2), record(2))
    monkeypatch.delenv(faults.VARIABLE)
    visible = faults.POINTS.index(point) >= faults.POINTS.index("commit:after-record")
    assert storage.list(f"{PATH}/rounds") == ["000000", "000001"] + ["000002"] * visible
    newest = log.newest()
    assert newest is not None
    assert newest.index == 1 + visible
    if not visible:
        log.commit(2, objects(2), record(2))
    assert len(log.all()) == 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_real_write_that_fails_shows_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    log = filled(Storage(tmp_path), 1)
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: _fail(code))
    with pytest.raises(StorageError, match="free space" if code == errno.ENOSPC else "writable"):
        log.commit(1, objects(1), record(1))
    with pytest.raises(StorageError, match=r"status\.json"):
        log.storage.write_json("status.json", {"state": "running"})
    monkeypatch.setattr(os, "fsync", fsync)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifacts"]
    assert os.listdir(tmp_path / PATH / "rounds") == ["000000"]


def _fail(code: int) -> None:
    raise OSError(code, os.strerror(code))


def test_a_rename_that_fails_in_passing_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([errno.EIO, errno.ESTALE])
    link = os.link

    def sometimes(source: str, target: str) -> None:
        for code in failures:
            _fail(code)
        link(source, target)

    monkeypatch.setattr(backends, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(os, "link", sometimes)
    assert filled(Storage(tmp_path), 1).newest() is not None


@pytest.mark.parametrize("text", ["commit:start", "nowhere@1", "commit:start@0", "commit:start@x"])
def test_a_fault_that_names_no_point_is_a_configuration_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, text)
    with pytest.raises(ConfigError, match="points: commit:start"):
        faults.point("commit:start")


def test_tensor_and_table_hashes_depend_on_values_alone() -> None:
    a, b = np.arange(3.0), np.ones((2, 2), np.float32)

    def of(payload: payloads.Payload, name: str = "x") -> str:
        return payloads.inspect(*payloads.encode(name, payload))[0]

    assert of({"a": a, "b": b}) == of({"b": b.T, "a": a.copy()})
    different = [
        {"a": a, "b": b},
        {"a": a, "c": b},
        {"a": a + 1, "b": b},
        {"a": a, "b": b.ravel()},
        {"a": b, "b": a},
    ]
    assert len({of(payload) for payload in different}) == len(different)
    table = pa.table({"name": ["x", None], "value": [1.0, float("nan")]})
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1, 1)])
    assert of(table) == of(chunked.replace_schema_metadata({"writer": "other"}))
    others = [
        table,
        table.slice(0, 1),
        table.select(["value", "name"]),
        pa.table({"name": ["x", ""], "value": [1.0, 2]}),
    ]
    assert len({of(other) for other in others}) == len(others)
