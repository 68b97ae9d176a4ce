"""The digest: equal for equal results, different for any other, and silent about what is not finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fedtailor.core.errors import StorageError
from fedtailor.core.messages import metric_row
from fedtailor.storage import payloads
from fedtailor.storage.commit_log import CommitLog
from fedtailor.storage.digest import digest, stage_digests
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import DONE, RunFolder

STAGES = [
    {"key": "base/seed42", "kind": "base", "method": "fedavg", "seed": 42, "artifact": "base-1", "rounds": 3},
    {
        "key": "personalise/lora/seed42",
        "kind": "personalise",
        "method": "lora",
        "seed": 42,
        "artifact": "p-1",
    },
]


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "local":
        yield Storage(tmp_path / "runs")
        return
    found = Storage(f"memory://{tmp_path.name}")
    yield found
    for name in found.list():
        found.delete(name)


Edit = Callable[[int, dict[str, Any], dict[str, Any]], None]


def make(storage: Storage, run_id: str = "r", edit: Edit = lambda index, objects, record: None) -> RunFolder:
    """A finished run of three rounds and one chunk."""
    run = RunFolder.create(storage, run_id, {"seeds": [42]})
    run.set_stages(STAGES)
    for entry, count in zip(STAGES, (3, 1), strict=True):
        log = run.log(entry)
        for index in range(count):
            objects: dict[str, Any] = {
                "global/shared": {"w": np.arange(4, dtype=np.float32) + index},
                "server/state": {"m": np.ones(2) * index},
                "clients/private": {"a": np.full(3, index, np.float32)},
                "adapters/r2/a/adapter_model.safetensors": payloads.encode("x", {"lora_A": np.ones((2, 2))})[1],
                "adapters/r2/a/adapter_config.json": b"{}",
                "metrics": pa.Table.from_pylist([metric_row(client="a", metric="acc", value=0.5, weight=3.0)]),
            }
            record = {"cohort": ["a"], "weights": {"a": 3.0}}
            if entry is STAGES[0]:
                edit(index, objects, record)
            log.commit(index, objects, record)
        storage.write_json(f"{log.path}/{DONE}", {})
    return run


def test_runs_with_equal_results_have_equal_digests(tmp_path: Path) -> None:
    make(Storage(tmp_path / "one"))
    make(Storage("memory://digest-two"), "other-name")
    assert digest(Storage(tmp_path / "one"), "r") == digest(Storage("memory://digest-two"), "other-name")
    Storage("memory://digest-two").delete("artifacts")
    Storage("memory://digest-two").delete("other-name")


def _global(index: int, objects: dict[str, Any], record: dict[str, Any]) -> None:
    objects["global/shared"] = {"w": objects["global/shared"]["w"] + np.float32(1e-6) * (index == 1)}


def _server(index: int, objects: dict[str, Any], record: dict[str, Any]) -> None:
    objects["server/state"] = {"m": objects["server/state"]["m"].astype(np.float32)}


def _private(index: int, objects: dict[str, Any], record: dict[str, Any]) -> None:
    objects["clients/private"] = {"b": objects["clients/private"]["a"]}


def _adapter(index: int, objects: dict[str, Any], record: dict[str, Any]) -> None:
    name = "adapters/r2/a/adapter_model.safetensors"
    objects[name] = payloads.encode("x", {"lora_A": np.ones((4, 1))})[1]


def _metric(index: int, objects: dict[str, Any], record: dict[str, Any]) -> None:
    objects["metrics"] = pa.Table.from_pylist([metric_row(client="a", metric="acc", value=0.5, weight=4.0)])


def _more(index: int, objects: dict[str, Any], record: dict[str, Any]) -> None:
    objects["extra"] = b"x"


def _cohort(index: int, objects: dict[str, Any], record: dict[str, Any]) -> None:
    record["cohort"] = ["b"]


@pytest.mark.parametrize("edit", [_global, _server, _private, _adapter, _metric, _more, _cohort])
def test_any_other_result_has_another_digest_and_the_stage_shows(tmp_path: Path, edit: Edit) -> None:
    make(Storage(tmp_path / "one"))
    make(Storage(tmp_path / "two"), edit=edit)
    one, two = (stage_digests(Storage(tmp_path / name), "r") for name in ("one", "two"))
    assert one["base/seed42"] != two["base/seed42"]
    assert one["personalise/lora/seed42"] == two["personalise/lora/seed42"]
    assert digest(Storage(tmp_path / "one"), "r") != digest(Storage(tmp_path / "two"), "r")


def test_pruning_and_what_is_outside_of_results_do_not_change_it(storage: Storage) -> None:
    run = make(storage)
    before = digest(storage, "r")
    run.log(STAGES[0]).prune(1, ("global/", "server/"))
    run.events.append({"event": "retried"})
    run.timing("base/seed42", 0, {"a": 0.5})
    run.set_status("complete")
    run.set_stages(list(reversed(STAGES)))
    assert digest(storage, "r") == before


def test_a_round_that_was_lost_and_done_again_gives_the_same_digest(storage: Storage) -> None:
    run = make(storage)
    before = digest(storage, "r")
    log = run.log(STAGES[0])
    objects = {name: log.read(2).bytes(name) for name in log.read(2).objects}
    record = log.read(2).record
    storage.write_bytes(f"{log.path}/{log.read(2).objects['metrics.parquet'].path}", b"")
    newest = log.newest()
    assert newest is not None
    assert newest.index == 1
    log.commit(2, objects, record)
    assert digest(storage, "r") == before


def test_every_unfinished_stage_is_named(storage: Storage) -> None:
    run = make(storage)
    for entry in STAGES:
        storage.delete(f"artifacts/{entry['artifact']}/{DONE}")
    with pytest.raises(StorageError) as caught:
        digest(storage, "r")
    text = str(caught.value)
    assert "base/seed42: unfinished, 3 commits of 3; personalise/lora/seed42: unfinished, 1 commits" in text
    run.set_stages([])
    with pytest.raises(StorageError, match="no stages yet"):
        digest(storage, "r")


def test_a_stage_with_fewer_rounds_than_asked_has_no_digest(storage: Storage) -> None:
    run = make(storage)
    run.set_stages([{**STAGES[0], "rounds": 4}])
    with pytest.raises(StorageError, match="base/seed42: only 3 of 4 rounds"):
        digest(storage, "r")


@pytest.mark.parametrize("name", ["global/shared.safetensors", "metrics.parquet", "clients/private.safetensors"])
def test_a_damaged_file_has_no_digest(storage: Storage, name: str) -> None:
    log: CommitLog = make(storage).log(STAGES[0])
    path = f"{log.path}/{log.read(1).objects[name].path}"
    data = bytearray(storage.read_bytes(path))
    data[-1] ^= 1
    storage.write_bytes(path, bytes(data))
    with pytest.raises(StorageError, match=f"base/seed42: damaged: .*{name} is not what was committed"):
        digest(storage, "r")
